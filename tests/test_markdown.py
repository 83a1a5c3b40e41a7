"""analysis.markdown: what is empty leaves nothing behind."""

from __future__ import annotations

from analysis.markdown import bullets, document, section, table


def test_a_table() -> None:
    assert table(["a", "b"], [["1", "2"], ["3", "-"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | - |"


def test_a_section_says_things_once_and_nothing_where_there_is_none() -> None:
    assert section("Notes", ["x", "y", "x"]) == "## Notes\n\n- x\n- y"
    assert section("Notes", []) == ""
    assert bullets([]) == ""


def test_a_document_has_no_empty_parts() -> None:
    assert document(["# t", "", "end"]) == "# t\n\nend\n"
