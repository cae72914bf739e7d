"""`/` and `/page/...`: the page's files, with headers that let it load nothing from elsewhere and run nothing inline.

`make page` builds `assets/` from `source/` again (Node.js is needed for that alone).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Response

ASSETS = Path(__file__).parent / "assets"
TYPES = {
    "app.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "licences.txt": "text/plain; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
}
# The style elements that the charting library puts into its figures; nothing else inline is let through.
_PLOT_STYLES = (
    "sha256-rCZUQsEQJf1DmnfnMZmlj08XC7qbIZySA6bEtitbQ00=",
    "sha256-jSYQUrW7J0b3jPqhZP9C2Xh1PyJKHKXd4s0fpGGKrww=",
    "sha256-/jg3HOQ97BIOLIR7iXhepLJanBbw11P39q1Ne1E+6Jc=",
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    f"style-src 'self'{''.join(f' {h!r}' for h in _PLOT_STYLES)}; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # with an ETag: asked again, sent once
}
router = APIRouter(include_in_schema=False)


@functools.cache
def _hashes() -> dict[str, str]:
    return json.loads((ASSETS / "assets.json").read_text("utf-8"))


def _file(name: str, media: str, known: str | None) -> Response:
    tag = f'"{_hashes()[name]}"'
    headers = {**HEADERS, "ETag": tag}
    if known == tag:
        return Response(status_code=304, headers=headers)
    return Response((ASSETS / name).read_bytes(), media_type=media, headers=headers)


@router.get("/")
def index(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    return _file("index.html", "text/html; charset=utf-8", if_none_match)


@router.get("/page/{name}")
def asset(
    name: Literal["app.js", "icon.svg", "licences.txt", "style.css"],
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    return _file(name, TYPES[name], if_none_match)
