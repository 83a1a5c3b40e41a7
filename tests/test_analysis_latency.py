"""analysis.latency: figure and tables from records written by hand, at real scale."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from analysis import latency
from analysis.cells import read
from analysis.latency_records import collect
from hcache import records

CONTEXTS, BATCHES = (32768, 131072), (1, 4)
BANDWIDTH = 4.0e12
WEIGHTS = 15e9
COMPLETED = "completed"


def baselines(context: int, batch: int) -> dict[str, Any]:
    sdpa = {"median": 60.0 + context / 4096, "p10": 59.0, "p90": 99.0}
    static = {"median": 20.0 + context / 4096 * batch, "p10": 19.0, "p90": 55.0}
    return {
        "sdpa": {"status": COMPLETED, "decode_ms": sdpa, "times_floor": 9.0},
        "static_compile": {"status": COMPLETED, "decode_ms": static, "times_floor": 4.5},
        "flash_attention_2": {"status": "not_available", "message": "flash-attn is not installed"},
    }


def point(context: int, batch: int, kept: float, status: str = COMPLETED, **more: Any) -> dict[str, Any]:
    kv = round(context * batch * kept * 131072)
    floor = 1e3 * (WEIGHTS + kv) / BANDWIDTH
    others = baselines(context, batch)
    fastest = min(60.0 + context / 4096, others["static_compile"]["decode_ms"]["median"])
    shared = {
        "id": f"{context}x{batch}",
        "context": context,
        "batch": batch,
        "status": status,
        "baselines": others,
        "ceilings": {
            "read_bytes_per_s": {"median": BANDWIDTH},
            "copy_bytes_per_s": {"median": 3.9e12},
            "host_to_device_bytes_per_s": {"median": 55e9},
            "device_to_host_bytes_per_s": None,
        },
        "started": "2026-12-01T10:00:00+00:00",
        "run": {"started": "2026-12-01T09:00:00+00:00", "process": 7},
        **more,
    }
    if status != COMPLETED:
        return {"message": "no", **shared}
    ms = 1.25 * floor
    return {
        "floor_ms": floor,
        "decode_ms": {"median": ms, "p10": ms - 0.1, "p90": ms + 0.2, "mean": ms + 0.3},
        "times_floor": 1.25,
        "speedup": fastest / ms,
        "tokens_per_s": 1e3 * batch / ms,
        "full_kv_bytes": context * batch * 131072,
        "resident_kv_bytes": kv,
        "attended_kv_bytes": kv,
        "host_kv_bytes": 3 * 2**30,
        "host_to_device_bytes_per_step": 5 * 2**20,
        "peak_device_bytes": 40 * 2**30,
        "prefill_ms": None,
        "engine": {"name": "graph", "compile": "tuned", "reason": ""},
        **shared,
    }


def write(
    root: Path, method: str, budget: str = "full", points: list[dict[str, Any]] | None = None, **changes: Any
) -> Path:
    """A record as runner=latency leaves it; changes: of device, drift, notes, and of the settings."""
    kept = 1.0 if budget == "full" else float(budget[1:])
    if points is None:
        points = [point(context, batch, kept) for batch in BATCHES for context in CONTEXTS]
    statuses = {p["status"] for p in points}
    device, drift = changes.pop("device", "NVIDIA H200"), changes.pop("drift", None)
    notes = changes.pop("notes", [])
    settings = {"steps": 50, "warmup": 10, "prompt": "filled", "contexts": list(CONTEXTS), **changes}
    config = {
        "model": {"name": "shape_llama31_8b", "content": "x"},
        "method": {"name": method, "window": 32},
        "benchmark": {"name": "latency", **settings},
        "budget": None if budget == "full" else {"kept_fraction": kept},
        "runtime": {"batch_size": 1, "seed": 0, "compile": "tuned", "temperature": 0.0, "top_p": 1.0},
    }
    whole = records.config_hash(config)
    cell = records.Cell("tag", "shape_llama31_8b", "latency", method, budget, 0, whole)
    result = {
        "schema": records.SCHEMA,
        "status": "infeasible" if statuses == {"infeasible"} else COMPLETED,
        "cell": cell.record(),
        "config": config,
        "config_hash": whole,
        "latency": {"drift": drift, "points": points},
        "notes": notes,
        "provenance": {
            "git": "abcdef0123456",
            "dirty": False,
            "versions": {"python": "3.12.1", "torch": "2.11.0", "transformers": "5.17.0"},
            "device": device,
            "started": "2026-12-01T10:00:00+00:00",
        },
    }
    directory = cell.directory(root)
    records.write_result(directory, result)
    return directory


@pytest.fixture
def sweep_root(tmp_path: Path) -> Path:
    write(tmp_path, "fullkv")
    for budget in ("f0.1", "f0.5"):
        write(tmp_path, "snapkv", budget)
    write(tmp_path, "heterocache", "f0.1", drift="never", notes=["synthetic profile: made up"])
    infeasible = [
        point(c, b, 0.1, "infeasible", smallest_fraction=0.2501, baselines={})
        for b in BATCHES
        for c in CONTEXTS
    ]
    write(tmp_path, "omnikv", "f0.1", infeasible)
    out = point(131072, 4, 0.5, "out_of_memory", message="OutOfMemoryError: 80 GiB")
    write(
        tmp_path,
        "omnikv",
        "f0.5",
        [*(point(c, b, 0.5) for c, b in ((32768, 1), (131072, 1), (32768, 4))), out],
    )
    return tmp_path


def text_of(root: Path) -> str:
    return latency.markdown(collect(read([root])))


def section(text: str, title: str) -> list[str]:
    (found,) = [part for part in text.split("\n## ") if part.startswith(title)]
    return found.splitlines()


def test_sweep_knows_floor_and_fastest_baseline(sweep_root: Path) -> None:
    sweep = collect(read([sweep_root]))
    assert (sweep.contexts, sweep.batches, sweep.budgets) == (list(CONTEXTS), list(BATCHES), ["f0.1", "f0.5"])
    kv = 32768 * 4 * 0.1 * 131072
    assert sweep.floor_ms("f0.1", (32768, 4)) == pytest.approx(1e3 * (WEIGHTS + kv) / BANDWIDTH, rel=1e-6)
    assert sweep.transformers((32768, 1)) == ("static_compile", 28.0)
    assert sweep.transformers((131072, 4)) == ("sdpa", 92.0)
    assert math.isnan(sweep.transformers((99, 1))[1])
    assert [line.label for line in sweep.panel("f0.1")] == ["fullkv", "heterocache", "omnikv", "snapkv"]


def test_table_has_times_floor_and_speed_of_each_point(sweep_root: Path) -> None:
    lines = section(text_of(sweep_root), "Batch 1, 0.1 kept")
    assert lines[2] == "|  | 32K | 131072 |".replace("131072", "128K")
    floor = 1e3 * (WEIGHTS + 32768 * 0.1 * 131072) / BANDWIDTH
    ms = 1.25 * floor
    row = next(line for line in lines if line.startswith("| snapkv"))
    assert f"{ms:.2f} [{ms - 0.1:.2f}, {ms + 0.2:.2f}], 1.25, **{28 / ms:.1f}x**" in row
    assert f"| floor, ms | {floor:.2f} |" in "\n".join(lines)
    assert next(line for line in lines if line.startswith("| sdpa")).startswith(
        "| sdpa | 68.00 [59.00, 99.00], 9.00"
    )
    assert next(line for line in lines if line.startswith("| flash")).count("not available") == 2


def test_gaps_say_why(sweep_root: Path) -> None:
    text = text_of(sweep_root)
    row = next(line for line in section(text, "Batch 4, 0.1 kept") if line.startswith("| omnikv"))
    assert row.count("infeasible (needs >= 0.26)") == 2
    row = next(line for line in section(text, "Batch 4, 0.5 kept") if line.startswith("| omnikv"))
    assert row.endswith("| out of memory |")
    notes = "\n".join(section(text, "Notes"))
    assert "omnikv at 0.5, 128K x 4: OutOfMemoryError: 80 GiB" in notes
    assert "heterocache: drift triggers: never" in notes
    assert "heterocache at 0.1: synthetic profile" in notes
    assert notes.count("flash-attn is not installed") == 1


def test_table_says_where_and_when(sweep_root: Path) -> None:
    heading = text_of(sweep_root).split("\n## ")[0]
    for said in ("2026-12-01", "abcdef0", "NVIDIA H200", "torch 2.11.0", "transformers 5.17.0", "50 steps"):
        assert said in heading
    assert "read 4000 GB/s, device copy 3900 GB/s, host to device 55 GB/s." in heading


def test_memory_is_shown_at_the_longest_context_with_numbers(sweep_root: Path) -> None:
    lines = section(text_of(sweep_root), "Batch 4, memory")
    row = next(line for line in lines if line.startswith("| omnikv | 0.5"))
    assert row.startswith("| omnikv | 0.5 | 32K |")
    row = next(line for line in lines if line.startswith("| snapkv | 0.1"))
    assert "| 128K |" in row
    assert "| 0.100 | 0.100 | 40.0 | 3.0 | 5.00 |" in row
    assert "graph, tuned" in row


def test_parts_of_a_sweep_are_joined_and_the_later_of_two_points_counts(tmp_path: Path) -> None:
    write(tmp_path, "snapkv", "f0.5", [point(32768, 1, 0.5)], contexts=[32768])
    again = point(32768, 1, 0.5, started="2026-12-02T10:00:00+00:00")
    again["decode_ms"] = {"median": 77.0, "p10": 77.0, "p90": 77.0, "mean": 77.0}
    write(tmp_path, "snapkv", "f0.5", [again, point(131072, 1, 0.5)], contexts=[32768, 131072])
    (line,) = collect(read([tmp_path])).lines
    assert set(line.points) == {(32768, 1), (131072, 1)}
    assert line.points[32768, 1]["decode_ms"]["median"] == 77.0


def test_baselines_of_one_run_count_once_and_of_several_by_their_median(tmp_path: Path) -> None:
    def timed(ms: float, process: int) -> dict[str, Any]:
        own = point(32768, 1, 0.5, run={"started": "x", "process": process})
        own["baselines"] = copy.deepcopy(own["baselines"])
        own["baselines"]["sdpa"]["decode_ms"]["median"] = ms
        return own

    write(tmp_path, "fullkv", points=[timed(10.0, 1)])
    write(tmp_path, "snapkv", "f0.5", [timed(10.0, 1)])
    write(tmp_path, "quest", "f0.5", [timed(20.0, 2)])
    assert collect(read([tmp_path])).baseline("sdpa", (32768, 1))["median"] == 15.0


def test_drifts_of_one_method_are_lines_of_their_own(tmp_path: Path) -> None:
    for number, drift in enumerate(("never", "always")):
        # Other contexts, since a directory is named after the settings.
        write(tmp_path, "heterocache", "f0.5", [point(32768, 1, 0.5)], drift=drift, contexts=[32768, number])
    labels = [line.label for line in collect(read([tmp_path])).lines]
    assert sorted(labels) == ["heterocache (drift always)", "heterocache (drift never)"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"device": "NVIDIA H100"}, "different devices"), ({"prompt": "random"}, "differ in")],
)
def test_what_cannot_stand_side_by_side_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path, "fullkv")
    write(tmp_path, "snapkv", "f0.5", **changes)
    with pytest.raises(ValueError, match=said):
        collect(read([tmp_path]))


def test_figure_has_a_panel_for_each_batch_and_budget_with_gaps(sweep_root: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = latency.draw(collect(read([sweep_root])))
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "0.1 kept, batch 1",
        "0.5 kept, batch 1",
        "0.1 kept, batch 4",
        "0.5 kept, batch 4",
    ]
    last = {line.get_label(): line for line in figure.axes[3].get_lines()}
    assert set(last) == {"fullkv", "omnikv", "snapkv", latency.FASTEST, latency.FLOOR}
    gap = list(last["omnikv"].get_ydata())
    assert gap[0] > 0
    assert math.isnan(gap[1])
    assert list(last[latency.FASTEST].get_ydata()) == [52.0, 92.0]
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    below = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "omnikv 0.1: infeasible (needs >= 0.26)" in below
    assert "omnikv 0.5 at 128K x 4: out of memory" in below


@pytest.mark.parametrize("width", [3.3, 6.9, 8.0])
def test_no_text_covers_another_at_any_width(tmp_path: Path, width: float) -> None:
    """As the published sweep has them: three budgets, two batches."""
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    for budget in ("f0.1", "f0.25", "f0.5"):
        write(tmp_path, "snapkv", budget)
    figure = latency.picture(read([tmp_path])).draw(width, [])
    drawn = backend.FigureCanvasAgg(figure).get_renderer()
    texts = [axis._left_title for axis in figure.axes] + [axis.yaxis.label for axis in figure.axes]
    texts += [axis.xaxis.label for axis in figure.axes[-2:]]
    boxes = [text.get_window_extent(drawn) for text in texts if text.get_text()]
    assert len(boxes) > 8
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]
    legend = figure.legends[0].get_window_extent(drawn)
    lowest = min(axis.get_tightbbox(drawn).y0 for axis in figure.axes)
    assert 0 <= lowest - legend.y1 < 0.5 * figure.dpi, "the legend is below the panels, and near"


def test_command_writes_both_files(
    sweep_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, table = tmp_path / "docs" / "latency.png", tmp_path / "docs" / "latency.md"
    assert latency.main([str(sweep_root), "--out", str(out), "--table", str(table)]) == 0
    first = out.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert table.read_text().startswith("# Decode latency of shape_llama31_8b")
    assert latency.main([str(sweep_root), "--out", str(out), "--table", str(table)]) == 0
    assert out.read_bytes() == first, "the same records give the same file"
    assert latency.main([str(sweep_root)]) == 0
    assert "## Batch 1, 0.1 kept" in capsys.readouterr().out


def test_wrong_commands_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "fullkv")
    assert latency.main([str(tmp_path), "--out", "x.gif"]) == 2
    assert "--out x.gif" in capsys.readouterr().err
    assert latency.main([str(tmp_path / "none")]) == 2
