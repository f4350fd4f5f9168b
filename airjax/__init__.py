"""airjax: run language models larger than the GPU's memory, at the speed of the link.

    engine = airjax.load("model.gguf", vram_budget_gib=8)
    for token in engine.chat([{"role": "user", "content": "Hello"}]):
        print(token.text, end="")

The names below are imported on first use, so that `import airjax.gguf` needs numpy alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airjax.api import Engine as Engine
    from airjax.api import RequestError as RequestError
    from airjax.api import load as load

__version__ = "0.1.0"
__all__ = ["Engine", "RequestError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "RequestError", "load"):
        return getattr(importlib.import_module("airjax.api"), name)
    raise AttributeError(f"module 'airjax' has no attribute {name!r}")
