"""The web page: three files of the package, which ask for nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PATHS = {
    "/": "index.html",
    "/page/style.css": "style.css",
    "/page/chat.js": "chat.js",
    "/page/markdown.js": "markdown.js",
    "/page/pipeline.js": "pipeline.js",
    "/page/sse.js": "sse.js",
}
_HEADERS = {
    # Scripts, styles and connections of this server alone: what a model writes can start nothing.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def serve(request: Request) -> Response:
    """One of the files."""
    path = _FOLDER / PATHS[request.url.path]
    kind = f"{_TYPES[path.suffix]}; charset=utf-8"
    return Response(path.read_bytes(), headers={**_HEADERS, "content-type": kind})
