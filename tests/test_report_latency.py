"""The latency part of a report and of the frames: every format says what the records say."""

from __future__ import annotations

import json
from pathlib import Path

from analysis import frame
from analysis.cells import read
from analysis.latency_records import sweeps
from tests.markup import Element, latex_tables, markdown_tables
from tests.test_analysis_latency import COMPLETED, point, write
from tests.test_report import close, fields, made, numbers, records, tables

CAPTION = "Every point of runner=latency"


def lines(root: Path) -> None:
    """A full cache and a method, one point of which ran out of memory."""
    write(root, "fullkv")
    own = [point(c, b, 0.1) for c, b in ((32768, 1), (131072, 1), (32768, 4))]
    write(root, "snapkv", "f0.1", [*own, point(131072, 4, 0.1, "out_of_memory")])


def other_model(directory: Path) -> None:
    """The same record of another model and device."""
    path = directory / "result.json"
    result = json.loads(path.read_text())
    result["cell"]["model"] = result["config"]["model"]["name"] = "shape_qwen25_14b"
    result["provenance"]["device"] = "NVIDIA B200"
    path.write_text(json.dumps(result))


def rows(table: Element) -> list[list[str]]:
    return [[field.text for field in row.inside if isinstance(field, Element)] for row in table.all("tr")]


def test_every_point_is_in_the_page_with_the_numbers_of_its_record(tmp_path: Path) -> None:
    lines(tmp_path / "in")
    page, markdown, tex = made(tmp_path / "in")
    (table,) = tables(page, CAPTION)
    known = {value for result in records(tmp_path / "in") for value in numbers(result)}
    for head, field in fields(table):
        if "data-value" in field.attributes and head not in ("context", "batch"):
            value = float(str(field.attributes["data-value"]))
            assert value in known, f"{head}: {value} is in no record"
            scale = 2**30 if "GiB" in head else 1
            assert close(head, field.text, value / scale)
    body = rows(table)[1:]
    points = sum(len(result["latency"]["points"]) for result in records(tmp_path / "in"))
    assert len(body) == points + 2 * 4, "two of transformers' own ran at each of four places"
    first = point(32768, 1, 0.1)
    ms, low, high = (f"{first['decode_ms'][key]:.2f}" for key in ("median", "p10", "p90"))
    fast, tokens = f"{first['speedup']:.1f}", f"{first['tokens_per_s']:.0f}"
    own = [row for row in body if row[0] == "snapkv"]
    assert own[0][2:] == [
        "32K",
        "1",
        f"{ms} [{low}, {high}]",
        "1.25",
        fast,
        tokens,
        "-",
        "40.0",
        "3.0",
        "5.00",
    ]
    assert own[-1][2:5] == ["128K", "4", "out of memory"]
    assert len(page.all("img")) == 1

    batches = [found for found in markdown_tables(markdown) if found[0][:2] == ["method", "kept"]]
    assert [batch[0] for batch in batches] == [["method", "kept", "32K", "128K"]] * 2
    assert batches == latex_tables(tex)
    assert tex.count("in brackets how many times its floor") == 2
    assert ["snapkv", "0.1", f"{ms} (1.25)"] == next(row for row in batches[0] if row[0] == "snapkv")[:3]
    assert next(row for row in batches[1] if row[0] == "snapkv")[3] == "out of memory"
    assert [row[0] for row in batches[0][-2:]] == ["transformers, sdpa", "transformers, static_compile"]


def test_what_cannot_stand_side_by_side_has_sections_of_its_own(tmp_path: Path) -> None:
    lines(tmp_path / "in")
    other_model(write(tmp_path / "in" / "other", "fullkv"))
    page, markdown, _ = made(tmp_path / "in")
    assert [table.all("caption")[0].text for table in tables(page, CAPTION)] == [
        f"{CAPTION}: shape_llama31_8b, NVIDIA H200",
        f"{CAPTION}: shape_qwen25_14b, NVIDIA B200",
    ]
    assert markdown.count("## shape_llama31_8b, NVIDIA H200: ms a decode step") == 2
    assert markdown.count("## shape_qwen25_14b, NVIDIA B200: ms a decode step") == 2


def test_sweeps_of_other_settings_are_told_apart(tmp_path: Path) -> None:
    for prompt in ("filled", "needle"):
        write(tmp_path, "fullkv", prompt=prompt)
    assert [sweep.name for sweep in sweeps(read([tmp_path]))] == [
        "shape_llama31_8b, NVIDIA H200, latency.prompt=filled",
        "shape_llama31_8b, NVIDIA H200, latency.prompt=needle",
    ]


def test_what_has_no_numbers_is_named_with_its_reason(tmp_path: Path) -> None:
    lines(tmp_path / "in")
    failed = write(tmp_path / "in", "quest", "f0.1", [])
    result = json.loads((failed / "result.json").read_text())
    changed = {**result, "status": "failed", "error": {"type": "X", "message": "it broke"}}
    (failed / "result.json").write_text(json.dumps(changed))
    page, markdown, _ = made(tmp_path / "in")
    found = list(markdown_tables(markdown)[-1][1:])
    where = "shape_llama31_8b, NVIDIA H200"
    assert found == [
        [f"quest, 0.1 kept: {where}", "failed", "it broke"],
        [f"snapkv, 0.1 kept, 128K x 4: {where}", "out of memory", "no"],
    ]
    (table,) = tables(page, "Cells without numbers")
    assert rows(table)[1:] == found
    assert "2 completed, 1 failed, 1 out of memory" in page.text


def test_a_cell_that_never_ran_is_with_those_of_its_setting(tmp_path: Path) -> None:
    write(tmp_path, "omnikv", "f0.1", [point(32768, 1, 0.1, "infeasible")], device=None)
    write(tmp_path, "fullkv")
    (sweep,) = sweeps(read([tmp_path]))
    assert {line.label for line in sweep.lines} == {"omnikv", "fullkv"}
    assert sweep.name == "shape_llama31_8b, NVIDIA H200"


def test_the_frame_has_a_row_a_point(tmp_path: Path) -> None:
    lines(tmp_path)
    found = frame.points(read([tmp_path])).set_index(["method", "context", "batch"])
    assert len(found) == 8
    for (method, context, batch), row in found.iterrows():
        own = point(context, batch, 1.0 if method == "fullkv" else 0.1, row["point_status"])
        if own["status"] == COMPLETED:
            kept = (
                "floor_ms",
                "times_floor",
                "speedup",
                "tokens_per_s",
                "full_kv_bytes",
                "resident_kv_bytes",
            )
            kept += (
                "attended_kv_bytes",
                "host_kv_bytes",
                "host_to_device_bytes_per_step",
                "peak_device_bytes",
            )
            assert [row[name] for name in kept] == [own[name] for name in kept]
            parts = {"": "median", "_p10": "p10", "_p90": "p90", "_mean": "mean"}
            assert {key: row[f"decode_ms{end}"] for end, key in parts.items()} == own["decode_ms"]
            assert row["engine"] == own["engine"]["name"]
    lost = found.loc[("snapkv", 131072, 4)]
    assert lost["point_status"] == "out_of_memory"
    assert lost[["decode_ms", "tokens_per_s"]].isna().all()
    assert list(frame.points([]).columns) == [*frame.WHO, *frame.POINT]
