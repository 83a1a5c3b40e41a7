"""analysis.latex: any text can be set, tables are whole."""

from __future__ import annotations

from analysis.latex import bold, escaped, spanning, table
from tests.markup import latex_tables


def test_every_sign_with_a_meaning_is_escaped() -> None:
    said = escaped('50% of $a_b & {c}#1 ~ ^ \\ < > | "')
    assert said == (
        r"50\% of \$a\_b \& \{c\}\#1 \textasciitilde{} \textasciicircum{} \textbackslash{} \textless{} "
        r"\textgreater{} \textbar{} \char34{}"
    )
    assert escaped("a\n\nb") == "a b"


def test_a_table() -> None:
    groups = [[["a", "1"], ["a", bold("2")]], [["b", spanning(1, "none")]]]
    said = table(["x", "y"], groups, 1, "About", "My data, 50%")
    assert latex_tables(said) == [[["x", "y"], ["a", "1"], ["a", "2"], ["b", "none"]]]
    assert r"\begin{tabular}{lr}" in said
    assert said.count(r"\addlinespace") == 1
    assert r"\label{tab:my-data-50}" in said
    assert said.count("{") == said.count("}")


def test_groups_of_one_row_need_no_space() -> None:
    assert r"\addlinespace" not in table(["x"], [[["a"]], [["b"]]], 1, "", "")
