"""A report's parts and how they become one file. Everything that comes in is text: it is escaped, never HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """`png` are its bytes; `alt` says in words what it shows."""

    png: bytes
    alt: str
    title: str = ""

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode()

    @classmethod
    def of(cls, figure: Any, alt: str, title: str = "") -> Picture:
        """Of a matplotlib figure."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        return cls(buffer.getvalue(), alt, title)


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it: paragraphs, then pictures, then a table of `rows` under `header`. Cells that are
    numbers stand to the right. `folded` hides it until it is opened; `fixed` is text whose lines stay as they are."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    folded: bool = False
    fixed: str = ""


def number(value: Any) -> str:
    """1234 as 1,234; 0.123456 as 0.1235; None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def environment() -> Any:
    """jinja2 with this room's templates: `style.css` for a page of one's own, and the filter `number`."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made.filters["number"] = number
    made.tests["numeric"] = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    return made


def page(
    title: str, *, lead: str = "", tiles: Sequence[tuple[Any, str]] = (), sections: Sequence[Section]
) -> str:
    """The file's text. `tiles` are pairs of a figure and what it counts."""
    found = environment().get_template("page.html")
    return str(found.render(title=title, lead=lead, tiles=tiles, sections=sections))
