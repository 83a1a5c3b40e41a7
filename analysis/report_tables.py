"""A report as Markdown, and its tables as LaTeX: the fields of each family's rows in either format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from analysis import latex, markdown
from analysis.columns import Column, Field
from analysis.families import Family, Row
from analysis.gaps import p_shown
from analysis.gathered import Report, Section
from analysis.latency_columns import OF_CONTEXTS, by_context
from analysis.table import legend, notes

BEST = "Bold: the highest score at that budget, which no test stands behind."
GAPS = ("method", "kept", "against", "task", "n", "difference [95%]", "wins/ties/losses", "p", "p (Holm)")


# --- Markdown


def as_markdown(report: Report, intervals: bool = True) -> str:
    """The whole report but for examples and configurations."""
    return markdown.document(
        [
            f"# {report.title}",
            *(part for section in report.sections for part in _section(section, intervals)),
            *_latency(report),
            _without_numbers(report),
        ]
    )


def _section(section: Section, intervals: bool) -> list[str]:
    family = section.family
    if not family.done:
        return [f"## {family.name}", _findings(section)]
    rows = [
        [row.label, *(_bold(row, place, intervals) for place in range(len(row.fields)))]
        for row in family.rows
    ]
    return [
        f"## {family.name}",
        _findings(section),
        markdown.table(family.header, rows),
        markdown.bullets([*legend(family.labelled), BEST, *notes(family.labelled)]),
        _gaps(section),
    ]


def _findings(section: Section) -> str:
    return markdown.nested((finding.text, finding.parts) for finding in section.findings)


def _bold(row: Row, place: int, intervals: bool) -> str:
    field = row.fields[place]
    text = f"**{field.text}**" if place in row.best else field.text
    return f"{text} {field.aside}".rstrip() if intervals or not field.is_interval else text


def _gaps(section: Section) -> str:
    rows = [
        [
            *(gap.label, gap.kept, gap.against, gap.task, str(gap.n), gap.shown),
            *(gap.record, p_shown(gap.p), p_shown(gap.p_holm)),
        ]
        for gap in (*section.gaps.together, *section.gaps.by_task)
    ]
    return markdown.table(GAPS, rows) if rows else section.without_gaps


def _latency(report: Report) -> Iterator[str]:
    for title, header, rows in _steps(report):
        yield f"## {title}\n\n{OF_CONTEXTS}\n\n{markdown.table(header, rows)}"


def _steps(report: Report) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and rows of what runner=latency left, for each sweep and batch."""
    for sweep in report.latency:
        for batch in sweep.batches:
            title = f"{sweep.name}: ms a decode step (times its floor), batch {batch}"
            yield title, *by_context(sweep, batch)


def _without_numbers(report: Report) -> str:
    rows = [[lost.name, lost.status, lost.reason] for lost in report.lost]
    if not rows:
        return ""
    return f"## Without numbers\n\n{markdown.table(('cell', 'status', 'reason'), rows)}"


# --- LaTeX


def as_latex(report: Report, intervals: bool = True) -> str:
    """A table for each family with numbers. It needs booktabs and graphicx."""
    head = r"% Needs \usepackage{booktabs,graphicx}. Made by python -m analysis.report from the records."
    tables = [_table(section.family, intervals) for section in report.sections if section.family.done]
    return "\n\n".join([head, *tables, *_latency_tables(report)]) + "\n"


def _latency_tables(report: Report) -> Iterator[str]:
    for title, header, rows in _steps(report):
        groups = [[list(map(latex.escaped, row)) for row in own] for _, own in groupby(rows, itemgetter(0))]
        caption = latex.escaped(f"{title}. {OF_CONTEXTS}")
        yield latex.table(list(map(latex.escaped, header)), groups, 2, caption, title)


def _table(family: Family, intervals: bool) -> str:
    groups = [[_row(row, family.columns, intervals) for row in rows] for _, rows in _by_method(family.rows)]
    header = [latex.escaped(name) for name in family.header]
    caption = f"{family.name}, {family.runs}. {' '.join(legend(family.labelled)[1:])} {BEST}"
    return latex.table(header, groups, 2, latex.escaped(caption), family.name)


def _by_method(rows: Sequence[Row]) -> groupby[str, Row]:
    return groupby(rows, key=lambda row: row.label)


def _row(row: Row, columns: Sequence[Column], intervals: bool) -> list[str]:
    """A row's places; the status of a cell without numbers takes all behind its budget and seed."""
    parts = [latex.escaped(row.label)]
    for place, (column, field) in enumerate(zip(columns, row.fields, strict=True)):
        if column.is_score and not row.cell.completed:
            return [*parts, latex.spanning(len(columns) - place, latex.escaped(field.text))]
        parts.append(_number(field, place in row.best, intervals))
    return parts


def _number(field: Field, best: bool, intervals: bool) -> str:
    text = "--" if field.text == "-" else latex.escaped(field.text)
    aside = latex.escaped(field.aside) if intervals or not field.is_interval else ""
    return f"{latex.bold(text) if best else text} {aside}".rstrip()
