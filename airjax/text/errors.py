"""The error of this package: one sentence for the user."""


class TextError(ValueError):
    """A tokenizer, a text or a chat template cannot be used; the message says which, why and what to do."""
