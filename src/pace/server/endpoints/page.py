"""The page at `/`: files of the package, sent as they are."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pace.server.service import Service

__all__ = ["PAGE_PATHS", "page"]

_FOLDER = Path(__file__).parent.parent / "page"

PAGE_PATHS = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("page", "api", "markdown", "metrics", "settings", "store")
    },
}
"""A file and its media type by path. They say nothing of the model, and need no key: the page asks for it."""

_HEADERS = {
    # Nothing but this server's own files, no inline script or style, and no text that becomes markup.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


async def page(service: Service, http: HttpRequest) -> Response:
    """A file of the page."""
    path = str(http.scope["path"]).removeprefix(http.scope.get("root_path", ""))
    name, kind = PAGE_PATHS[path]
    return Response(_read(name), headers=_HEADERS, media_type=kind)


@cache
def _read(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()
