"""How the line of each method looks: the same in every figure, told apart by colour-blind eyes and in print.

Knows names of methods; nothing of records or of matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hcache.records import text_digest


@dataclass(frozen=True)
class Style:
    """How a line looks; dashes as matplotlib's linestyle."""

    colour: str
    marker: str
    dashes: str = "-"


# The same in every figure. Colours of Okabe and Ito and of Tol, told apart by colour-blind eyes; markers and
# dashes tell them apart in print.
STYLES = {
    "fullkv": Style("#000000", "", "--"),
    "cake": Style("#CC79A7", "P", "-."),
    "h2o": Style("#999933", "^", "--"),
    "heterocache": Style("#D55E00", "o"),
    "omnikv": Style("#332288", ">", "--"),
    "pyramidkv": Style("#009E73", "v", "-."),
    "quest": Style("#E69F00", "X"),
    "random": Style("#777777", "p", ":"),
    "shadowkv": Style("#882255", "<", "-."),
    "snapkv": Style("#0072B2", "D"),
    "streaming_llm": Style("#56B4E9", "s", "--"),
}
_OTHER_MARKERS = ("*", "h", "8", "d")
_OTHER_DASHES = ("-", "--", "-.", ":")
_OTHER_STYLES = [
    Style(colour, marker, dashes)
    for marker, dashes in zip(_OTHER_MARKERS, _OTHER_DASHES, strict=True)
    for colour in ("#117733", "#AA4499", "#88CCEE", "#661100", "#0072B2", "#DDAA33")
]


def styles(methods: Mapping[str, str]) -> dict[str, Style]:
    """A look for each label, from its method's name alone, so that a method looks alike in all figures.

    A method unknown here takes the look its name hashes to, or the next free one; several labels of one
    method share the colour.

    methods: label -> name of the method.
    """
    named: dict[str, Style] = {}
    for name in sorted(set(methods.values())):
        start = int(text_digest(name), 16)
        free = (_OTHER_STYLES[(start + step) % len(_OTHER_STYLES)] for step in range(len(_OTHER_STYLES)))
        unused = (look for look in free if look not in named.values())
        named[name] = STYLES.get(name) or next(unused, _OTHER_STYLES[0])
    found: dict[str, Style] = {}
    for label, name in methods.items():
        look, variant = named[name], sum(methods[other] == name for other in found)
        found[label] = _variant(look, variant) if variant else look
    return found


def _variant(look: Style, number: int) -> Style:
    """The look of another setting of the same method."""
    markers = (*_OTHER_MARKERS, "o")  # not as many as dashes: more pairs before one comes again
    marker = markers[(number - 1) % len(markers)]
    dashes = _OTHER_DASHES[(_OTHER_DASHES.index(look.dashes) + number) % len(_OTHER_DASHES)]
    return Style(look.colour, marker, dashes)
