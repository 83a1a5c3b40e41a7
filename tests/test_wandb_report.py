"""analysis.wandb_report: what it would save, held against what real runs log; the server is replaced."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import wandb

from analysis import wandb_keys, wandb_report
from runners import latency
from tests import test_latency
from tests.offline_runs import OFFLINE, Tracked, needle_run, tracked, without_account

pytest.importorskip("wandb_workspaces")

from wandb_workspaces.reports.v2 import interface, internal

from analysis import wandb_panels

PANELS = {"Bar Chart", "Scatter Plot", "Run History Line Plot", "Run Comparer"}
TASKS = ["needle_700", "needle_800"]


@pytest.fixture(autouse=True, scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with without_account(tmp_path_factory.mktemp("wandb-home")):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Tracked]:
    """What runner=evaluate and runner=latency log."""
    place = tmp_path_factory.mktemp("runs")
    timed = replace(test_latency.cell(place / "latency", contexts=[64], baselines=[]), tracker=OFFLINE)
    latency._shared.clear()
    assert latency.run(timed).status == "completed"
    return [needle_run(place, "snapkv"), tracked(timed)]


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the server is asked")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)
    monkeypatch.setattr(wandb, "Api", refused)
    monkeypatch.setattr(wandb, "login", refused)


def preview(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert wandb_report.main(["team/proj", *arguments, "--preview"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found: dict[str, Any] = json.loads(printed.out)
    return found


def alone(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a home in which nobody is logged in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {name: str(home) for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
    env = {**kept, **own, "NETRC": str(home / "netrc")}
    command = [sys.executable, "-m", "analysis.wandb_report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why nothing was done."""
    assert wandb_report.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return printed.err


def named(report: Any) -> Any:
    """Without the random ids of panels and run sets."""
    if isinstance(report, Mapping):
        return {key: named(value) for key, value in report.items() if key not in ("id", "__id__")}
    return [named(value) for value in report] if isinstance(report, list) else report


def grids(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]


def panels(report: Mapping[str, Any], kind: str | None = None) -> list[dict[str, Any]]:
    found = [panel for grid in grids(report) for panel in grid["panelBankSectionConfig"]["panels"]]
    assert {panel["viewType"] for panel in found} == PANELS, "a new kind must be known to these tests"
    return [panel["config"] for panel in found if kind in (None, panel["viewType"])]


def run_sets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [run_set for grid in grids(report) for run_set in grid["runSets"]]


def paths(value: Any, above: str = "") -> Iterator[str]:
    """Dotted paths of everything in nested mappings, as W&B names it."""
    for key, part in value.items():
        yield above + key
        if isinstance(part, Mapping):
            yield from paths(part, f"{above}{key}.")


def keys_in(report: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(section, name) of every key that a panel, a column, a grouping or an order names."""
    found = set()
    for config in panels(report, "Bar Chart"):
        found |= {("summary", name) for name in config["metrics"]}
    for config in panels(report, "Run History Line Plot"):
        found |= {("history", name) for name in (*config["metrics"], config["xAxis"])}
    for config in panels(report, "Scatter Plot"):
        found |= {tuple(config[axis].split(":")) for axis in ("xAxis", "yAxis")}
    for run_set in run_sets(report):
        places = [*run_set["grouping"], *(key["key"] for key in run_set["sort"]["keys"])]
        found |= {(place["section"], place["name"]) for place in places}
        found |= {tuple(column.split(":")) for column in run_set["runFeed"]["columnOrder"]}
    return {(where, _without_value(name) if where == "config" else name) for where, name in found}


def _without_value(name: str) -> str:
    """W&B keeps each top entry of a configuration under `value`."""
    first, value, rest = name.split(".")
    assert value == "value"
    return f"{first}.{rest}"


def logged(runs: Sequence[Tracked]) -> set[tuple[str, str]]:
    found = set()
    for run in runs:
        found |= {("config", path) for path in paths(run.config)}
        found |= {("summary", path) for path in paths(run.summary)}
        found |= {("history", key) for row in run.history for key in row}
    return found


def test_every_key_is_one_that_runs_log(
    runs: list[Tracked], no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    records = str(runs[0].directory)
    report = preview(capsys, "--tag", "test", "--records", records)
    asked, known = keys_in(report), logged(runs)
    assert asked - known == set()
    expected = [("summary", "score"), ("history", "score/all"), ("history", "decode_ms_per_token")]
    expected += [("summary", f"tasks.{task}.score") for task in TASKS]
    expected += [("summary", "memory.device_kv_bytes"), ("config", "method.name")]
    assert set(expected) <= asked
    found = [c["metricRegex"] for c in panels(report, "Run History Line Plot") if "metricRegex" in c]
    names = {name for where, name in known if where == "history"}
    assert [{name for name in names if re.search(regex, name)} for regex in found] == [
        {"score/all", *(f"score/{task}" for task in TASKS)},
        {"latency/decode_ms_batch_1"},
    ]


def test_a_task_on_a_scale_of_its_own_gets_no_panel_of_0_to_100() -> None:
    known = [
        {"tasks": {"a": {"score": 1}, "ppl": {"score": 7, "scale": "reported"}}},
        {"tasks": {"b": {}}},
        {},
    ]
    assert wandb_report.tasks(known) == ["a", "b"]


def test_every_key_that_is_explained_is_logged(runs: list[Tracked]) -> None:
    known = logged(runs)
    for key in wandb_keys.KEYS:
        assert (key.where, key.name.replace("<task>", TASKS[0]).replace("<n>", "1")) in known
        assert f"| `{key.name}` | {key.where} | {key.means} |" in wandb_keys.explained()


def test_run_sets_are_the_groups(
    runs: list[Tracked], no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    report = preview(capsys, "--tag", runs[0].group, "--tag", "x=1", "--tag", runs[0].group)
    for grid in grids(report):
        assert [run_set["name"] for run_set in grid["runSets"]] == ["test", "x=1"], "each once"
    for run_set in run_sets(report):
        (one,) = run_set["filters"]["filters"]
        assert one["key"] == {"section": "run", "name": "group"}
        assert (one["op"], one["value"], one["disabled"]) == ("=", run_set["name"], False)
        assert run_set["runFeed"]["lockColumns"]
    groupings = {tuple(key["name"] for key in run_set["grouping"]) for run_set in run_sets(report)}
    budget = ("budget.value.kept_fraction", "budget.value.kept_tokens")
    assert groupings == {(*budget, "method.value.name"), ("method.value.name", *budget), ()}


def test_panels_are_those_that_were_promised(no_server: None, capsys: pytest.CaptureFixture[str]) -> None:
    report = preview(capsys, "--tag", "a")
    scatter = [(config["xAxis"], config["yAxis"]) for config in panels(report, "Scatter Plot")]
    assert ("summary:memory.device_kv_bytes", "summary:score") in scatter
    assert ("summary:budget.requested_fraction", "summary:score") in scatter
    assert ("summary:budget.requested_tokens", "summary:score") in scatter
    assert ["score"] in [config["metrics"] for config in panels(report, "Bar Chart")]
    assert all(panels(report, "Run Comparer"))
    lines = [tuple(config["metrics"]) for config in panels(report, "Run History Line Plot")]
    assert lines == [("score/all",), ("decode_ms_per_token",), (), ()]
    text = json.dumps(report)
    assert "`a`" in text
    assert "higher" in text
    for grid in grids(report):
        places = [panel["layout"] for panel in grid["panelBankSectionConfig"]["panels"]]
        corners = {(place["x"], place["y"]) for place in places}
        assert len(corners) == len(places)
        assert all(place["x"] + place["w"] <= wandb_panels.COLUMNS for place in places)


def test_records_are_shown_but_not_needed(
    runs: list[Tracked], no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = [c["chartTitle"] for c in panels(preview(capsys, "--tag", "test"), "Bar Chart")]
    report = preview(capsys, "--tag", "test", "--records", str(runs[0].directory))
    more = [c["chartTitle"] for c in panels(report, "Bar Chart")]
    assert more == [*titles, *(f"{task} (0 to 100, higher is better)" for task in TASKS)]
    (table,) = [b["content"] for b in report["spec"]["blocks"] if "| snapkv |" in b.get("content", "")]
    assert "| method | kept | needle_700 | needle_800 |" in table


def test_it_is_the_same_each_time_and_the_library_reads_it_back(
    no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = (preview(capsys, "--tag", "a", "--tag", "x=1") for _ in range(2))
    assert named(first) == named(again)
    assert (first["project"], first["displayName"]) == (
        {"name": "proj", "entityName": "team"},
        "KV-cache compression: a, x=1",
    )
    back = interface.Report._from_model(internal.ReportViewspec.model_validate(first))
    back.width = first["spec"]["width"]  # which the library doesn't read back
    assert wandb_panels.plain(back) == first


def test_many_tags_have_a_title_that_fits(no_server: None, capsys: pytest.CaptureFixture[str]) -> None:
    tags = [f"a_tag_with_a_long_name_{number}" for number in range(9)]
    report = preview(capsys, *(part for tag in tags for part in ("--tag", tag)))
    assert len(report["displayName"]) == 128
    assert tags[-1] in report["description"]


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["team", "--tag", "a"], "'team' is no W&B project; give ENTITY/PROJECT"),
        (["team/a/b", "--tag", "a"], "'team/a/b' is no W&B project"),
        (["/proj", "--tag", "a"], "'/proj' is no W&B project"),
        (["team/proj"], "no --tag"),
        (["team/proj", "--tag", "it's"], "is no tag of a run"),
        (["team/proj", "--tag", ""], "is no tag of a run"),
        (["team/proj", "--tag", "a", "--records", "nowhere"], "no result.json below nowhere"),
    ],
)
def test_what_makes_no_report_is_said(
    arguments: list[str], said: str, no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *arguments)


def test_records_of_another_tag_are_refused(
    runs: list[Tracked], no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "team/proj", "--tag", "a", "--records", str(runs[0].directory))
    assert "--records holds tag test, which is no --tag (there are: a)" in said


def test_a_missing_library_is_said(
    no_server: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused(capsys, "team/proj", "--tag", "a", "--preview")
    assert "need wandb-workspaces: pip install 'hcache[analysis]'" in said


def test_nobody_logged_in_is_said(tmp_path: Path) -> None:
    """By W&B's own client, in a process of its own: it finds no key, and asks neither user nor server."""
    done = alone(tmp_path, "team/proj", "--tag", "a")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: not logged in to W&B: run `wandb login`" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_is_there_without_the_library() -> None:
    code = (
        "import sys; from analysis import wandb_report\n"
        "try: wandb_report.main(['--help'])\n"
        "except SystemExit: print([name for name in sys.modules if name.startswith('wandb')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "ENTITY/PROJECT" in done.stdout


def test_the_command_prints_json_and_nothing_else(tmp_path: Path) -> None:
    """In a process of its own: what the library's import says would be seen."""
    done = alone(tmp_path, "team/proj", "--tag", "a", "--preview")
    assert json.loads(done.stdout)["project"]["entityName"] == "team"
    assert done.stderr == ""


# --- saving, with the server's answers replaced


class Server:
    """W&B as far as a report asks it: runs of a tag, and a place for what is saved."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, runs: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        self.saved: list[dict[str, Any]] = []
        api = create_autospec(wandb.Api, instance=True)
        api.runs.side_effect = lambda path, filters, lazy: [
            SimpleNamespace(summary_metrics=summary) for summary in runs.get(filters["group"], ())
        ]
        api.projects.return_value = [SimpleNamespace(name="proj")]
        self.api = api
        monkeypatch.setattr(wandb, "Api", lambda: api)
        monkeypatch.setattr(wandb, "login", create_autospec(wandb.login, return_value=True))
        monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
        monkeypatch.setattr(interface, "execute_graphql", self._answer)

    def _answer(self, api: Any, query: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
        self.saved.append(dict(variables))
        keys = ("name", "displayName", "description", "spec")
        view = {"id": "Vmlldzox", **{key: variables[key] for key in keys}}
        return {"upsertView": {"view": view}}


def test_a_report_is_saved_as_a_draft(
    runs: list[Tracked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(monkeypatch, {"test": [run.summary for run in runs], "b": [{}]})
    assert wandb_report.main(["team/proj", "--tag", "test", "--tag", "b"]) == 0
    address = "https://wandb.example/team/proj/reports/KV-cache-compression:-test,-b--Vmlldzox\n"
    assert capsys.readouterr().out == address
    (saved,) = server.saved
    assert (saved["type"], saved["entityName"], saved["projectName"]) == ("runs/draft", "team", "proj")
    server.api.runs.assert_any_call("team/proj", filters={"group": "test"}, lazy=False)
    server.api.create_project.assert_not_called()
    spec = json.loads(saved["spec"])
    expected = wandb_panels.plain(wandb_panels.report("team", "proj", ["test", "b"], TASKS))
    assert named(spec) == named(expected["spec"])
    tasks = [
        c["metrics"] for c in panels({"spec": spec}, "Bar Chart") if c["metrics"][0].startswith("tasks.")
    ]
    assert tasks == [[f"tasks.{task}.score"] for task in TASKS], "those of the runs that are there"


def test_a_tag_without_runs_saves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(monkeypatch, {"a": [{}]})
    said = refused(capsys, "team/proj", "--tag", "a", "--tag", "b")
    assert "team/proj has no run of tag b" in said
    assert "wandb sync -e team -p proj outputs/b/" in said
    assert server.saved == []


@pytest.mark.parametrize("error", [ValueError("Could not find project proj"), RuntimeError("no\nroute")])
def test_what_the_server_refuses_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(monkeypatch, {"a": [{}]})
    server.api.projects.side_effect = error
    assert " ".join(str(error).split()) in refused(capsys, "team/proj", "--tag", "a")
    server.api.runs.side_effect = error
    assert " ".join(str(error).split()) in refused(capsys, "team/proj", "--tag", "a")
    assert server.saved == []
