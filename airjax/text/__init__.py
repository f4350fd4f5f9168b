"""Text and token ids: tokenizers and chat templates from GGUF metadata."""

from airjax.text.chat_template import ChatTemplate
from airjax.text.errors import TextError
from airjax.text.grammar import Grammar
from airjax.text.stops import StopStrings
from airjax.text.stream import TextStream
from airjax.text.tokenizer import Tokenizer
from airjax.text.translation import Translation, same_vocabulary

__all__ = [
    "ChatTemplate",
    "Grammar",
    "StopStrings",
    "TextError",
    "TextStream",
    "Tokenizer",
    "Translation",
    "same_vocabulary",
]
