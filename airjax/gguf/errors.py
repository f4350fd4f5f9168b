"""The one error of this package, and how text from a file appears in messages."""


class GGUFError(ValueError):
    """A file that cannot be used. The message is one sentence: which file, what is wrong, what to do."""


def shown(text: str, limit: int = 80) -> str:
    """Text from a file for a person's eyes: what would steer a terminal is escaped, and the end is cut off."""
    escaped = repr(text[:limit])[1:-1]
    return escaped if len(escaped) <= limit and len(text) <= limit else f"{escaped[:limit]}..."
