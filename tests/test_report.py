"""analysis.report: every format says what the records say, and no text can harm the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.report import main
from hcache.records import Predictions, read_result, write_result
from runners import evaluate
from tests.cells import cell, write_checkpoint
from tests.markup import Element, html_rows, latex_tables, markdown_tables, parsed
from tests.test_analysis_table import leave

pytest.importorskip("pandas")

SCORES = "Scores, bytes and times"


def answered(where: Path, scores: list[float], prediction: str = "said", answer: str = "right") -> Path:
    """Lines beside a record: what was answered to the examples of both tasks."""
    known = {"metric": "exact", "prediction": prediction, "answers": [answer]}
    lines = [
        {"task": task, "id": str(number), "score": score, **known}
        for task in ("one", "two")
        for number, score in enumerate(scores)
    ]
    Predictions(where).rewrite(lines)
    return where


def changed(where: Path, **parts: Any) -> Path:
    """A record with other parts."""
    result = read_result(where)
    assert result is not None
    write_result(where, {**result, **parts})
    return where


def sweep(root: Path) -> None:
    """Three methods at two budgets with odd numbers, one of them infeasible once."""
    answered(leave(root, "fullkv", None, 1.0, prefill_ms=100 / 3, decode_ms=7.77), [1.0] * 10)
    for number, kept in enumerate((0.1, 0.25), start=1):
        odd = {"resident": kept + 1 / 300, "attended": kept - 1 / 700, "prefill_ms": 51 / number}
        answered(leave(root, "snapkv", kept, 0.3 * number, **odd), [0.3 * number] * 10)
        answered(leave(root, "h2o", kept, 0.7, host=123457 * number, moved=1234.5, **odd), [0.7] * 10)
    leave(root, "omnikv", 0.1, infeasible=0.33)
    answered(leave(root, "omnikv", 0.25, 0.7), [0.7] * 10)


def made(root: Path, *arguments: str) -> tuple[Element, str, str]:
    """The page, the Markdown and the LaTeX of what lies below a directory."""
    out = root.parent / "made"
    files = [out / name for name in ("page.html", "tables.md", "tables.tex")]
    asked = [f"--{name}" for name in ("out", "markdown", "latex")]
    pairs = [str(part) for pair in zip(asked, files, strict=True) for part in pair]
    assert main([str(root), *pairs, *arguments]) == 0
    page, markdown, tex = (file.read_text(encoding="utf-8") for file in files)
    return parsed(page), markdown, tex


def tables(page: Element, caption: str) -> list[Element]:
    return [t for t in page.all("table") if t.all("caption")[0].text.startswith(caption)]


def records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(root.rglob("result.json"))]


def check_numbers(page: Element, markdown: str, tex: str, found: list[dict[str, Any]]) -> int:
    """Every table of scores says the same in all formats, and its numbers are the records'; how many are."""
    shown = tables(page, SCORES)
    in_markdown = [table for table in markdown_tables(markdown) if "resident" in table[0]]
    in_latex = latex_tables(tex)
    assert len(shown) == len(in_markdown) == len(in_latex) > 0
    known = {value for result in found for value in numbers(result)}
    count = 0
    for element, rows, latex_rows in zip(shown, in_markdown, in_latex, strict=True):
        assert html_rows(element) == rows
        for row, latex_row in zip(rows, latex_rows, strict=True):
            assert latex_row == row[: len(latex_row)]
            assert set(row[len(latex_row) :]) <= {"-"}
        for head, field in fields(element):
            if head not in ("method", "kept", "seed", "data seed") and "data-value" in field.attributes:
                value = float(str(field.attributes["data-value"]))
                assert value in known, f"{head}: {value} is in no record"
                assert close(head, field.text, value)
                count += 1
    return count


def numbers(part: Any) -> list[float]:
    """Every number in a record."""
    if isinstance(part, dict):
        return [number for value in part.values() for number in numbers(value)]
    if isinstance(part, list):
        return [number for value in part for number in numbers(value)]
    return [float(part)] if isinstance(part, (int, float)) else []


def fields(table: Element) -> list[tuple[str, Element]]:
    heads = [head.text for head in table.all("thead")[0].all("th")]
    rows = table.all("tbody")[0].all("tr")
    return [pair for row in rows for pair in zip(heads, row.inside, strict=True)]  # type: ignore[misc]


def close(head: str, text: str, value: float) -> bool:
    """Whether the text is the value, rounded to the digits that it shows."""
    units = {"MiB": 2**20, "KiB": 2**10}
    size = next((size for unit, size in units.items() if unit in head), 1)
    shown = text.split()[0]
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - value / size) <= 0.5000001 * 10**-digits


def test_all_formats_show_the_numbers_of_the_records(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    shown = made(tmp_path / "in")
    assert check_numbers(*shown, records(tmp_path / "in")) == 6 * 9 - 6 * 2 + 6 * 2
    for text in (shown[0].text, shown[1]):
        assert "scores 0 to 100 with 95% intervals, that of all tasks from theirs" in text


def test_numbers_of_real_cells_with_two_seeds(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    for method, budget in (
        ("fullkv", {}),
        ("snapkv", {"kept_fraction": 0.5}),
        ("quest", {"kept_tokens": 300}),
    ):
        for seed in (0, 1):
            outcome = evaluate.run(cell(checkpoint, tmp_path / "in", method, seed=seed, **budget))
            assert outcome.status == "completed", outcome.message
    page, markdown, tex = made(tmp_path / "in")
    assert check_numbers(page, markdown, tex, records(tmp_path / "in")) >= 6 * 8
    (shown,) = tables(page, SCORES)
    assert [row[:3] for row in html_rows(shown)] == [
        ["method", "kept", "seed"],
        *[["fullkv", "all", "0"], ["fullkv", "all", "1"]],
        *[["quest", "300 tokens", "0"], ["quest", "300 tokens", "1"]],
        *[["snapkv", "0.5", "0"], ["snapkv", "0.5", "1"]],
    ]


def test_intervals_can_be_left_out_of_the_tables(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    page, markdown, tex = made(tmp_path / "in", "--no-intervals")
    with_intervals = html_rows(tables(page, SCORES)[0])
    (bare,) = [table for table in markdown_tables(markdown) if "resident" in table[0]]
    place = bare[0].index("one")
    assert "[" in with_intervals[1][place]
    assert [row[place].split(" [")[0] for row in with_intervals] == [row[place] for row in bare]
    assert latex_tables(tex)[0][1][place] == bare[1][place] == "100"
    assert bare[1][-1] == with_intervals[1][-1], "ratios stay"


def test_the_best_of_a_budget_is_bold_in_every_format(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    page, markdown, tex = made(tmp_path / "in")
    (shown,) = tables(page, SCORES)
    bold = [
        [field.text.split()[0] for field in row.inside if field.all("strong")]  # type: ignore[union-attr]
        for row in shown.all("tbody")[0].all("tr")
    ]
    labels = [" ".join(row[:2]) for row in html_rows(shown)[1:]]
    at = dict(zip(labels, bold, strict=True))
    # fullkv is no method of a budget; h2o and omnikv are equal at 0.25.
    assert at == {
        "fullkv all": [],
        "h2o 0.1": ["70"] * 3,
        "h2o 0.25": ["70"] * 3,
        "omnikv 0.1": [],
        "omnikv 0.25": ["70"] * 3,
        "snapkv 0.1": [],
        "snapkv 0.25": [],
    }
    assert markdown.count("**70**") == tex.count(r"\textbf{70}") == 9
    assert markdown.count("**") == 18


def test_where_all_are_alike_nobody_is_best(tmp_path: Path) -> None:
    for method in ("snapkv", "h2o"):
        answered(leave(tmp_path / "in", method, 0.25, 0.5), [0.5] * 10)
    _, markdown, tex = made(tmp_path / "in")
    assert "**" not in markdown
    assert "textbf" not in tex


def test_what_keeps_everything_is_never_best(tmp_path: Path) -> None:
    for score in (0.5, 0.9):
        where = leave(tmp_path / "in", "fullkv", None, score, options={"mark": score})
        answered(where, [score] * 10)
    _, markdown, _ = made(tmp_path / "in")
    assert "fullkv (mark=0.9)" in markdown
    assert "**" not in markdown


# --- the page


def test_the_page_is_whole(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    page, *_ = made(tmp_path / "in")
    assert len(page.all("h1")) == 1
    everything = [page, *(e for name in ("section", "table", "article") for e in page.all(name))]
    ids = [str(e.attributes["id"]) for e in everything if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert {str(a.attributes["href"]) for a in page.all("a")} == {f"#{name}" for name in ids}
    for table in page.all("table"):
        assert len(table.all("caption")) == 1
        assert all(head.attributes["scope"] in ("col", "row") for head in table.all("th"))
        widths = {len(row.inside) for row in table.all("tr")}
        assert len(widths) == 1


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    page, *_ = made(tmp_path / "in")
    for name in ("script", "img", "link", "iframe", "source"):
        for element in page.all(name):
            source = element.attributes.get("src") or element.attributes.get("href") or "data:"
            assert source.startswith("data:"), source
    assert not page.all("link")
    (looks,) = page.all("style")
    assert "url(" not in looks.text
    assert "@import" not in looks.text
    assert "prefers-color-scheme: dark" in looks.text
    assert "@media print" in looks.text


def test_figures_are_inside_and_say_what_they_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep(tmp_path / "in")
    page, *_ = made(tmp_path / "in")
    figures = page.all("img")
    assert [str(figure.attributes["alt"]).split(",")[0] for figure in figures] == [
        "Score against KV bytes on the device",
        "Score against the budget that was asked for",
    ]
    for figure in figures:
        assert str(figure.attributes["src"]).startswith("data:image/svg+xml;base64,")
        assert "m on b" in str(figure.attributes["alt"])


def test_without_matplotlib_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, *_ = made(tmp_path / "in")
    assert not page.all("img")
    assert "pip install 'hcache[analysis]'" in page.text


def test_no_text_of_a_model_or_an_error_is_markup(tmp_path: Path) -> None:
    hostile = "\u2028</pre></td><script>alert(1)</script><img src=x onerror=alert(1)>\x00\u202e | & 50% \\x"
    root = tmp_path / "in"
    answered(leave(root, "fullkv", None, 1.0), [1.0] * 10, answer=hostile)
    where = leave(root, "snapkv", 0.25, 0.5, notes=[hostile[:-12]], options={"mark": "<b>|x"})
    leave(root, "snapkv", 0.25, 0.5, options={"mark": "y"})
    written = answered(where, [0.5] * 10).joinpath("predictions.jsonl")
    written.write_text(written.read_text().replace('"said"', json.dumps(hostile)))
    broken = leave(root, "h2o", 0.25)
    error = {"type": "E", "message": hostile[:-12], "traceback": hostile[:-12]}
    changed(broken, status="failed", error=error)
    page, markdown, tex = made(root)
    assert len(page.all("script")) == 1
    assert all(str(image.attributes["src"]).startswith("data:") for image in page.all("img"))
    said = hostile.replace("\x00", "\\u0000").replace("\u202e", "\\u202e")
    assert said in [quote.text for quote in page.all("q")]
    assert check_numbers(page, markdown, tex, records(root))
    assert tex.replace(r"\{", "").replace(r"\}", "").count("{") == tex.replace(r"\{", "").replace(
        r"\}", ""
    ).count("}")


def test_provenance_of_each_cell(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    page, *_ = made(tmp_path / "in")
    (shown,) = tables(page, "Where each cell is from")
    rows = [dict(zip(html_rows(shown)[0], row, strict=True)) for row in html_rows(shown)[1:]]
    assert len(rows) == 7
    assert {row["commit"] for row in rows} == {"0123456"}
    assert {row["versions"] for row in rows} == {"torch 2.1"}
    found = {result["config_hash"][:8]: result for result in records(tmp_path / "in")}
    for row in rows:
        memory = found[row["hash"]].get("memory")
        assert row["device KV bytes"] == (f"{memory['device_kv_bytes']:,.0f}" if memory else "-")
    configs = [json.loads(pre.text) for pre in page.all("pre")]
    assert sorted(map(json.dumps, configs)) == sorted(
        json.dumps(r["config"]) for r in records(tmp_path / "in")
    )


def test_examples_stand_side_by_side(tmp_path: Path) -> None:
    answered(leave(tmp_path / "in", "fullkv", None, 1.0), [1.0] * 10, "full", "right")
    answered(leave(tmp_path / "in", "snapkv", 0.25, 0.9), [1.0] * 9 + [0.0], "lost", "right")
    page, *_ = made(tmp_path / "in")
    shown = page.all("article")
    assert [e.all("caption")[0].text for e in shown] == [
        "one, example 9, 0.25 keptRight: right",
        "two, example 9, 0.25 keptRight: right",
    ]
    assert html_rows(shown[0])[1:] == [["fullkv", "100", "full"], ["snapkv", "0", "lost"]]
    assert "differ on 2 of 20 examples" in page.text
    page, *_ = made(tmp_path / "in", "--examples", "1")
    assert len(page.all("article")) == 1


def test_a_long_answer_is_cut_and_says_so(tmp_path: Path) -> None:
    answered(leave(tmp_path / "in", "fullkv", None, 1.0), [1.0] * 10)
    answered(leave(tmp_path / "in", "snapkv", 0.25, 0.0), [0.0] * 10, "x" * 5000)
    page, *_ = made(tmp_path / "in")
    (said, *_rest) = [row.text for row in page.all("article")[0].all("td") if "xxx" in row.text]
    assert len(said) < 800
    assert said.endswith("... (5000 characters)")


# --- what it says


def findings(page: Element) -> str:
    return next(e for e in page.all("section") if e.attributes.get("id") == "summary").text


def test_a_difference_is_stated_only_where_it_is_shown(tmp_path: Path) -> None:
    root = tmp_path / "in"
    answered(leave(root, "fullkv", None, 0.5), [0.0, 1.0] * 5)
    answered(leave(root, "worse", 0.25, 0.0), [0.0] * 10)
    answered(leave(root, "alike", 0.25, 0.5), [0.0, 1.0] * 5)
    answered(leave(root, "near", 0.25, 0.4), [0.0, 1.0] * 4 + [0.0, 0.0])
    said = findings(made(root)[0])
    assert "At 0.25 kept, against fullkv on the same 20 examples (all examples" in said
    assert "Holm at 5% over 3 comparisons" in said
    assert "Lower: worse -50.0 [-70.0, -30.0]." in said
    assert (
        "No difference shown: alike, alike on all 20 (at 95%, up to 14% could still differ); near -10.0 ["
        in said
    )
    assert "Higher" not in said


def test_who_holds_more_than_asked_is_named(tmp_path: Path) -> None:
    answered(leave(tmp_path / "in", "quest", 0.25, resident=1.06), [0.5] * 10)
    answered(leave(tmp_path / "in", "snapkv", 0.25, resident=0.251), [0.5] * 10)
    assert "More on the device than the budget asks: quest (see" in findings(made(tmp_path / "in")[0])


def test_another_method_can_be_what_others_are_held_against(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    page, *_ = made(tmp_path / "in", "--against", "h2o")
    assert "At 0.1 kept, against h2o with 0.1 kept on the same 20 examples" in findings(page)
    assert tables(page, "Against h2o")
    page, *_ = made(tmp_path / "in", "--against", "unknown")
    assert "--against unknown: no completed cell has this method" in page.text


def test_settings_are_told_apart_and_never_in_one_table(tmp_path: Path) -> None:
    for model in ("m", "n"):
        answered(leave(tmp_path / "in", "snapkv", 0.25, model=model), [0.5] * 10)
    for size in (1, 2):
        where = answered(leave(tmp_path / "in", "h2o", 0.25, tag=f"t{size}"), [0.5] * 10)
        result = read_result(where)
        assert result is not None
        result["config"]["runtime"]["batch_size"] = size
        changed(where, config=result["config"], config_hash=f"{size}" * 64)
    page, *_ = made(tmp_path / "in")
    heads = [head.text for head in page.all("h2")]
    assert heads == ["Summary", "m on b, batch_size=1", "m on b, batch_size=2", "n on b", "Provenance"]


# --- half-finished sweeps


def test_what_has_no_numbers_is_named_with_the_reason(tmp_path: Path) -> None:
    root = tmp_path / "in"
    sweep(root)
    changed(
        leave(root, "cake", 0.25), status="failed", error={"message": "out of memory", "traceback": "line 7"}
    )
    stopped = root / "tag" / "m" / "b" / "quest-f0.25-s0-01234567"
    stopped.mkdir()
    (stopped / "predictions.jsonl").write_text(
        '{"task": "one", "id": "0"}\n{"task": "one", "id": "1"}\n{"tas'
    )
    (leave(root, "pyramidkv", 0.25) / "result.json").write_text("{")
    page, markdown, _ = made(root)
    (shown,) = tables(page, "Cells without numbers")
    rows = {row[0]: row[1:] for row in html_rows(shown)[1:]}
    assert rows["omnikv, 0.1 kept: m on b"] == ["infeasible, needs >= 0.33", "no"]
    assert rows["cake, 0.25 kept: m on b"] == ["failed", "out of memoryTracebackline 7"]
    status, reason = rows[str(stopped)]
    assert (status, reason.split(" and")[0]) == ("unfinished", "2 examples are done")
    (unread,) = [reason for name, (_, reason) in rows.items() if "pyramidkv" in name]
    assert "result.json can't be read" in unread
    assert len(rows) == 4
    for name in rows:
        assert f"| {name} |" in markdown
    assert "Cells: 6 completed, 1 failed, 1 infeasible, 1 unreadable, 1 unfinished." in page.text


def test_a_sweep_without_any_number_has_a_page(tmp_path: Path) -> None:
    leave(tmp_path / "in", "omnikv", 0.1, infeasible=0.33)
    page, markdown, tex = made(tmp_path / "in")
    assert "no cell is completed" in page.text
    assert "needs >= 0.33" in markdown
    assert latex_tables(tex) == []


def test_cells_without_lines_are_shown_without_comparison(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    for path in (tmp_path / "in").rglob("predictions.jsonl"):
        path.unlink()
    page, markdown, tex = made(tmp_path / "in")
    assert check_numbers(page, markdown, tex, records(tmp_path / "in"))
    assert "No paired comparison" in page.text


def test_other_examples_are_not_compared(tmp_path: Path) -> None:
    answered(leave(tmp_path / "in", "fullkv", None), [0.5] * 10)
    answered(leave(tmp_path / "in", "snapkv", 0.25), [0.5] * 4)
    page, *_ = made(tmp_path / "in")
    assert "different examples of one" in page.text


def test_a_shard_without_examples_is_shown_empty(tmp_path: Path) -> None:
    sweep(tmp_path / "in")
    where = leave(tmp_path / "in", "cake", 0.25)
    changed(where, score=None, tasks={}, budget={}, memory={}, latency={}, aggregates={})
    page, markdown, tex = made(tmp_path / "in")
    assert check_numbers(page, markdown, tex, records(tmp_path / "in"))


# --- the command


def test_the_same_records_give_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path / "in")
    out = tmp_path / "in" / "report.html"
    assert main([str(tmp_path / "in")]) == 0
    first = out.read_bytes()
    assert f"{out}: 6 completed, 1 infeasible\n" in capsys.readouterr().out
    assert main([str(tmp_path / "in")]) == 0
    assert out.read_bytes() == first


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no result.json below" in capsys.readouterr().err
    sweep(tmp_path / "in")
    assert main([str(tmp_path / "in"), "--examples", "-1"]) == 2
    assert "--examples -1: must be 0 or more" in capsys.readouterr().err
