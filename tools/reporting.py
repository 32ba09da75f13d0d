"""What the tools show: reports of tables, printed for people, as CSV or as JSON.

A command gathers a ``Report``: tables, and lines of text before and after them. ``show`` prints it
as tables for people, as CSV (every table with its own head, first column its name) or as one JSON
object. Tables hold plain values; how they look is said by their columns.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


def plain(value: Any) -> str:
    """A value as it is; nothing for None and NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fixed(digits: int, scale: float = 1.0, suffix: str = "") -> Callable[[Any], str]:
    """Shows numbers with so many digits behind the point, after multiplying by ``scale``."""

    def shown(value: Any) -> str:
        if value is None or not math.isfinite(value):
            return "-"
        return f"{value * scale:.{digits}f}{suffix}"

    return shown


ms = fixed(2)
percent = fixed(1, 100.0, "%")
ratio = fixed(2)


def size(value: Any) -> str:
    """Bytes with a unit."""
    if value is None or not math.isfinite(value):
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its key in CSV and JSON, its head in the table, and how a value looks there."""

    key: str
    head: str
    show: Callable[[Any], str] = plain


@dataclass(frozen=True, slots=True)
class Table:
    """A named table; every row has a value a column."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]


@dataclass(slots=True)
class Report:
    """What a command has found.

    Attributes:
        before, after: lines of text around the tables; for people only.
        values: further values of the JSON object.
    """

    tables: list[Table] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def show(report: Report, options: argparse.Namespace) -> None:
    """Print a report in the form that the options ask for."""
    if getattr(options, "json", False):
        text = _as_json(report)
    elif getattr(options, "csv", False):
        text = _as_csv(report)
    else:
        text = _as_text(report)
    print(text, end="")


def _as_text(report: Report) -> str:
    parts = ["\n".join(report.before)] if report.before else []
    parts += [
        "\n".join([*([table.title] if table.title else []), *lines(table)])
        for table in report.tables
        if table.rows
    ]
    parts += ["\n".join(report.after)] if report.after else []
    return "\n\n".join(parts) + "\n" if parts else ""


def lines(table: Table) -> list[str]:
    """A table as aligned lines: numbers to the right, texts to the left."""
    heads = [column.head for column in table.columns]
    cells = [
        [column.show(value) for column, value in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    left = [all(isinstance(row[at], str) for row in table.rows) for at in range(len(heads))]
    widths = [max(len(row[at]) for row in (heads, *cells)) for at in range(len(heads))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in (heads, *cells)
    ]


def _as_csv(report: Report) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for index, table in enumerate(report.tables):
        if index:
            out.write("\n")
        writer.writerow(["table", *(column.key for column in table.columns)])
        writer.writerows([table.name, *map(_finite, row)] for row in table.rows)
    return out.getvalue()


def _as_json(report: Report) -> str:
    whole: dict[str, Any] = {key: _finite(value) for key, value in report.values.items()}
    for table in report.tables:
        keys = [column.key for column in table.columns]
        whole[table.name] = [dict(zip(keys, map(_finite, row), strict=True)) for row in table.rows]
    return json.dumps(whole, indent=1) + "\n"


def _finite(value: Any) -> Any:
    """For JSON and CSV: plain types, None where there is no number."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def add_form(parser: argparse.ArgumentParser) -> None:
    """--csv and --json."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values")
    form.add_argument("--json", action="store_true", help="print one JSON object")
