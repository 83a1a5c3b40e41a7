r"""LaTeX: text escaped, a table with booktabs' rules. Knows nothing of what stands in it.

A document that takes it needs `\usepackage{booktabs}`, and graphicx for the width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
}


def escaped(text: str) -> str:
    """Text that LaTeX sets as it stands, in one line."""
    return "".join(_SPECIAL.get(sign, sign) for sign in " ".join(text.split()))


def bold(text: str) -> str:
    """LaTeX in bold."""
    return rf"\textbf{{{text}}}"


def spanning(count: int, text: str) -> str:
    """LaTeX over several columns."""
    return rf"\multicolumn{{{count}}}{{l}}{{{text}}}"


def table(
    header: Sequence[str], groups: Iterable[Sequence[Sequence[str]]], left: int, caption: str, label: str
) -> str:
    """A floating table; all texts are LaTeX already.

    groups: rows, with a little space between groups. left: columns set to the left, before numbers.
    """
    columns = "l" * left + "r" * (len(header) - left)
    bodies = ["\n".join(f"{' & '.join(row)} \\\\" for row in rows) for rows in groups]
    between = "\n\\addlinespace\n" if any("\n" in body for body in bodies) else "\n"
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        f"{' & '.join(header)} \\\\",
        r"\midrule",
        between.join(bodies),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines)
