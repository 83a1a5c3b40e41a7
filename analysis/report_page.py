"""A report as one HTML page: summary, figures, tables, examples, and where each number is from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from analysis import page, pictures
from analysis.cells import Cell, commits
from analysis.columns import Field
from analysis.disagreements import Chosen, Disagreement
from analysis.families import Family, Row, seeds
from analysis.findings import Finding
from analysis.gaps import Gap, p_shown
from analysis.gathered import Lost, Report, Section
from analysis.latency_columns import OF_POINTS, POINTS, every_point
from analysis.latency_records import Sweep
from analysis.page import Entry, Html, bullets, element, folded
from analysis.report_tables import BEST, GAPS
from analysis.table import legend, notes

_LONGEST = 700
"""Characters of a prediction or answer that are shown."""
_ANSWERS = 5
_PROVENANCE = (
    *(
        "cell",
        "kept",
        "seed / data seed",
        "n",
        "device KV bytes",
        "full KV bytes",
        "host KV bytes",
        "peak bytes",
    ),
    *("seconds", "engine", "commit", "versions", "device", "started", "hash", "directory"),
)


def as_html(report: Report) -> str:
    """The page."""
    parts = [_part(number, section) for number, section in enumerate(report.sections, start=1)]
    return page.page(
        f"hcache report: {report.title}",
        element("header", element("h1", "hcache report"), element("p", report.title, class_="where")),
        element("nav", *_contents(report), aria_label="Contents"),
        element("main", _summary(report), *parts, *_latency(report), *_lost(report), _provenance(report)),
        element(
            "footer", element("p", "Made by python -m analysis.report from records alone; nothing was run.")
        ),
    )


def _contents(report: Report) -> Iterator[Html]:
    places = [("summary", "Summary")]
    places += [(f"part-{number}", part.family.name) for number, part in enumerate(report.sections, start=1)]
    places += [("latency", "Latency")] if report.latency else []
    places += [("lost", "Without numbers")] if report.lost else []
    for place, name in [*places, ("provenance", "Provenance")]:
        yield element("a", name, href=f"#{place}")


def _summary(report: Report) -> Html:
    several = len(report.sections) > 1
    said: list[str] = [element("p", f"Cells: {report.counts}.")]
    for part in report.sections:
        said += [element("h3", part.family.name)] if several else []
        said.append(bullets(map(_finding, part.findings)))
    return element("section", element("h2", "Summary"), *said, id="summary")


def _finding(finding: Finding) -> Html:
    return page.joined([finding.text, bullets(finding.parts)])


def _part(number: int, part: Section) -> Html:
    family = part.family
    inside: list[str] = [element("h2", family.name)]
    if family.done:
        said = bullets([*legend(family.labelled), BEST, *notes(family.labelled)])
        below = element("div", said, class_="notes")
        inside += [_results(family), below, *map(_picture, pictures.of_family(family))]
    else:
        inside.append(element("p", "No cell of these is completed."))
    inside += [element("h3", "Paired differences"), *_gaps(part)]
    inside += [element("h3", "Where methods disagree"), *_examples(part.examples)]
    return element("section", *inside, id=f"part-{number}")


def _picture(shown: pictures.Shown) -> Html:
    if shown.missing:
        return element("p", f"{shown.caption} Not drawn: {shown.missing}.")
    return page.picture(shown.svg, shown.words, shown.caption, "scale" if shown.has_scale else "lines")


# --- tables


def _results(family: Family) -> Html:
    rows = [[Entry(row.label), *_fields(row)] for row in family.rows]
    return page.table(f"Scores, bytes and times: {family.name}", family.header, rows)


def _fields(row: Row) -> Iterator[Entry]:
    for place, field in enumerate(row.fields):
        yield _entry(field, place in row.best)


def _entry(field: Field, best: bool = False) -> Entry:
    return Entry(_field(field, best), field.value, field.value is not None or field.text == "-")


def _field(field: Field, best: bool) -> Html:
    text = element("strong", field.text) if best else page.escaped(field.text)
    return page.joined([text, *([" ", element("span", field.aside, class_="aside")] if field.aside else [])])


def _gaps(part: Section) -> Iterator[Html]:
    if not part.gaps.by_task:
        yield element("p", part.without_gaps or "There is nothing to compare.")
        return
    against = part.gaps.by_task[0].against
    yield element(
        "p",
        f"Every method minus {against}, in points, on the same examples: bootstrap intervals, p-values of "
        "sign flips, and Holm's over the rows of each table. That no difference is shown doesn't mean that "
        "there is none; an interval without width means that all examples differ alike, not that they always "
        "would.",
    )
    for name, rows in (("all examples alike", part.gaps.together), ("by task", part.gaps.by_task)):
        if rows:
            yield page.table(f"Against {against}, {name}: {part.family.name}", GAPS, map(_gap, rows))


def _gap(gap: Gap) -> list[Entry]:
    return [
        *(Entry(gap.label), Entry(gap.kept), Entry(f"{gap.against}, {gap.against_kept}"), Entry(gap.task)),
        Entry(str(gap.n), gap.n, True),
        Entry(gap.shown, gap.difference, True),
        Entry(gap.record, gap.wins - gap.losses, True),
        Entry(p_shown(gap.p), gap.p, True),
        Entry(p_shown(gap.p_holm), gap.p_holm, True),
    ]


# --- examples


def _examples(examples: Chosen) -> Iterator[Html]:
    if not examples.shown:
        yield element("p", f"On none of {examples.compared} examples that several methods answered.")
        return
    yield element(
        "p",
        f"Scores differ on {examples.disagree} of {examples.compared} examples that several methods answered "
        f"at one budget; {len(examples.shown)} of them are here, the widest of each task and budget first. "
        "They were chosen because methods disagree: they show how answers go wrong, not how often.",
    )
    yield element("div", *map(_example, examples.shown), class_="examples")


def _example(example: Disagreement) -> Html:
    title = f"{example.task}, example {example.id}, {example.kept} kept{example.seed}"
    answers = [_quoted(answer) for answer in example.answers[:_ANSWERS]]
    more = len(example.answers) - len(answers)
    wanted = ["Right: ", *answers, f" and {more} more" if more > 0 else ""] if answers else []
    rows = [
        [Entry(label), Entry(f"{100 * line['score']:.0f}", line["score"], True), Entry(_quoted(_said(line)))]
        for label, line in example.lines
    ]
    header = ("method", "score", "prediction")
    return element("article", page.table(title, header, rows, "example", page.joined(wanted)))


def _said(line: dict[str, object]) -> str:
    return str(line.get("prediction", ""))


def _quoted(text: str) -> Html:
    cut = f"... ({len(text)} characters)" if len(text) > _LONGEST else ""
    return page.joined([element("q", text[:_LONGEST]), cut])


# --- what has no numbers, and where the others are from


def _latency(report: Report) -> Iterator[Html]:
    if report.latency:
        shown = [part for sweep in report.latency for part in _sweep(sweep)]
        yield element("section", element("h2", "Latency"), *shown, id="latency")


def _sweep(sweep: Sweep) -> Iterator[Html]:
    yield element("h3", sweep.name)
    yield _picture(pictures.of_latency(sweep))
    yield element("p", OF_POINTS)
    rows = [[_entry(field) for field in row] for row in every_point(sweep)]
    yield page.table(f"Every point of runner=latency: {sweep.name}", POINTS, rows)


def _lost(report: Report) -> Iterator[Html]:
    if report.lost:
        rows = [[Entry(lost.name), Entry(lost.status), Entry(_reason(lost))] for lost in report.lost]
        shown = page.table("Cells without numbers, and why", ("cell", "status", "reason"), rows, "texts")
        yield element("section", element("h2", "Without numbers"), shown, id="lost")


def _reason(lost: Lost) -> Html:
    trace = [folded("Traceback", element("pre", lost.trace))] if lost.trace else []
    return page.joined([lost.reason, *trace])


def _provenance(report: Report) -> Html:
    cells = [(label, cell) for part in report.sections for label, cell in part.family.labelled]
    found = page.table(
        "Where each cell is from", _PROVENANCE, (_origin(label, cell) for label, cell in cells)
    )
    timed = [(cell.method, cell) for sweep in report.latency for cell in sweep.cells]
    configs = [
        folded(f"{label}, {cell.kept} kept: {cell.directory}", element("pre", _config(cell)))
        for label, cell in [*cells, *timed]
    ]
    return element(
        "section",
        element("h2", "Provenance"),
        found,
        element("h3", "Configurations"),
        element("p", "As resolved when the cell ran; a cell's hash covers what decides its numbers."),
        *configs,
        id="provenance",
    )


def _config(cell: Cell) -> str:
    return json.dumps(cell.result["config"], indent=1, ensure_ascii=False)


def _origin(label: str, cell: Cell) -> list[Entry]:
    made, memory = cell.result["provenance"], cell.result.get("memory") or {}
    examples = sum(task["n"] for task in (cell.result.get("tasks") or {}).values())
    names = ("device_kv_bytes", "full_kv_bytes", "host_kv_bytes", "peak_device_bytes")
    return [
        Entry(label),
        Entry(cell.kept, cell.order[1], True),
        Entry(" / ".join(filter(None, seeds(cell))), None, True),
        Entry(str(examples), examples, True),
        *(_count(memory.get(name)) for name in names),
        _count(made.get("seconds")),
        *(Entry(text or "-") for text in _places(cell)),
    ]


def _places(cell: Cell) -> Iterable[str]:
    made, engine = cell.result["provenance"], cell.result.get("engine") or {}
    yield ", ".join(str(engine[key]) for key in ("name", "backend") if engine.get(key))
    yield commits([cell])[0]
    yield cell.versions
    yield str(made.get("device") or "")
    yield str(made.get("started") or "")
    yield str(cell.result.get("config_hash", ""))[:8]
    yield str(cell.directory)


def _count(number: float | None) -> Entry:
    return Entry("-", None, True) if number is None else Entry(f"{number:,.0f}", number, True)
