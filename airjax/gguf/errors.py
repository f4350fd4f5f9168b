"""The one error of this package."""


class GGUFError(ValueError):
    """A file that cannot be used. The message is one sentence: which file, what is wrong, what to do."""
