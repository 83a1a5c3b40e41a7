"""What all figures share: matplotlib's settings, the sheet, quiet axes, the small text at the foot, the file.

matplotlib is imported when something is drawn, since tables need none. Knows nothing of records or methods
(the looks of methods are in analysis.styles).
"""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
WIDTH = 8.0
"""Inches of a figure as wide as a page, with what must be said of it at its foot."""
COLUMN = {"one": 3.3, "two": 6.9}
"""Inches of a figure for one or two columns of a paper, which says in its caption what must be said."""
LEFT = 0.6
"""Inches before the panels, where the text at the foot begins as well."""

_DPI = 150
_SCREEN_DPI = 100  # in notebooks, which are kept with their pictures
_LINE = 0.155  # inches of a line of small text
_CHARACTERS = 17.5  # of small text in an inch of the figure's width
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.linewidth": 0.7,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # TrueType: text stays text, and publishers take no Type 3
    "ps.fonttype": 42,
    "svg.hashsalt": "hcache",  # names of svg elements come from it, not from chance
}
# What would make two files of one figure differ, or tie a file to a version.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}


@dataclass(frozen=True, repr=False)
class Picture:
    """A figure that can be drawn at any width; a notebook shows it as the value of a cell.

    Args:
        draw: makes it, given its width in inches and the lines at its foot.
        data: the numbers that are drawn.
        said: what a reader must know: gaps, where it was measured, what intervals are.
    """

    draw: Callable[[float, Sequence[str]], Figure]
    data: pd.DataFrame
    said: Sequence[str]

    def page(self) -> Figure:
        """As wide as a page, with what must be said at its foot."""
        return self.draw(WIDTH, wrapped(self.said))

    def __repr__(self) -> str:
        """For those who can't see it: what must be said, and what its numbers are."""
        columns = ", ".join(map(str, self.data.columns))
        return f"Picture of {len(self.data)} rows of {columns}. {' '.join(filter(None, self.said))}"

    def _repr_png_(self) -> bytes:
        """Asked for by IPython."""
        return _in_few_colours(rendered(self.page, ".png", _SCREEN_DPI))


def save(picture: Picture, out: Path, width: str = "page") -> None:
    """Write the figure, its numbers as CSV beside it and, for a column of a paper (COLUMN), as text what its
    caption must say; a page says it at the foot.
    """
    inches = COLUMN.get(width, WIDTH)
    foot = [] if width in COLUMN else wrapped(picture.said, inches)
    write(lambda: picture.draw(inches, foot), out)
    picture.data.to_csv(out.with_suffix(".csv"), index=False)
    if width in COLUMN:
        out.with_suffix(".txt").write_text("\n".join(text for text in picture.said if text) + "\n", "utf-8")


def check(out: Path) -> None:
    """Raise ValueError where no figure can be written to `out`; said before records are read."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: the suffix must be one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib, which is not installed: pip install 'hcache[analysis]'")


def write(draw: Callable[[], Figure], out: Path) -> None:
    """Draw and write with our settings alone, whatever the user's matplotlibrc says; the suffix decides the
    format. The same figure gives the same file."""
    content = rendered(draw, out.suffix)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)


def rendered(draw: Callable[[], Figure], suffix: str, dpi: int = _DPI) -> bytes:
    """What `write` writes."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        draw().savefig(content, format=suffix[1:], dpi=dpi, metadata=_METADATA[suffix])
    return content.getvalue()


def _in_few_colours(png: bytes) -> bytes:
    """The same picture with a palette, in about a third of the bytes."""
    from PIL import Image  # matplotlib requires it

    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(small, "png", optimize=True)
    return small.getvalue()


def sheet(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI)


def quiet(axis: Axes) -> None:
    """A light grid behind the data, and no lines above and at the right."""
    axis.grid(color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


# --- the text at the foot


def wrapped(texts: Iterable[str], width: float = WIDTH) -> list[str]:
    """Lines of small text for a figure of this width in inches; each text begins a line."""
    return [line for text in texts for line in textwrap.wrap(text, int(_CHARACTERS * width))]


def foot_inches(lines: Sequence[str]) -> float:
    """The height that these lines take, with what parts them from what is above."""
    return _LINE * (len(lines) + 0.5)


def write_foot(figure: Figure, lines: Sequence[str]) -> None:
    """Put the lines at the foot of the figure."""
    width, height = figure.get_size_inches()
    style: dict[str, Any] = {"fontsize": 6.8, "color": "0.3", "va": "bottom", "linespacing": 1.4}
    figure.text(LEFT / width, 0.06 / height, "\n".join(lines), **style)
