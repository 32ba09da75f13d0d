"""The dashboard asks only for what is exported, and as it has to be asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DASHBOARD = Path(__file__).resolve().parents[2] / "tools" / "grafana" / "hpcsync.json"
CONSTANT = {"job", "run_id", "node", "rank"}
FUNCTIONS = {"histogram_quantile", "increase", "max", "rate", "sum", "time"}
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<text>"[^"]*") | (?P<range>\[\$__rate_interval\]) | (?P<number>\d+(?:\.\d+)?)
    | (?P<name>[a-zA-Z_]\w*) | (?P<match>=~|!=|!~|=) | (?P<mark>[-+*/(){},])
    )""",
    re.VERBOSE,
)
Tokens = list[tuple[str, str]]


def tokens(expr: str) -> Tokens:
    found, at = [], 0
    while at < len(expr.rstrip()):
        match = _TOKEN.match(expr, at)
        assert match, f"not understood from here on: {expr[at:]}"
        found.append((str(match.lastgroup), match[match.lastgroup or 0]))
        at = match.end()
    return found


class Asked:
    """What an expression asks for: metrics with the labels matched, and labels it groups by.

    The grammar is the part of PromQL that the dashboard uses: terms joined by ``+ - * /``; a term
    is a number, a function of terms, an aggregation ``max by (labels) (term)``, or a metric with
    matchers and maybe a range.
    """

    def __init__(self, expr: str) -> None:
        self.expr = expr
        self.metrics: list[tuple[str, set[str], tuple[str, ...]]] = []  # and functions around it
        self.groups: list[tuple[set[str], int, int]] = []  # over which of the metrics
        self._tokens = tokens(expr)
        self._around: list[str] = []
        self._sum()
        assert not self._tokens, f"left over in {expr}: {self._tokens}"

    def _take(self, *kinds: str) -> str:
        assert self._tokens, f"{self.expr}: ends too early"
        kind, text = self._tokens.pop(0)
        assert kind in kinds or text in kinds, f"{self.expr}: {text!r} where {kinds} belong"
        return text

    def _next(self) -> str:
        return self._tokens[0][1] if self._tokens else ""

    def _sum(self) -> None:
        self._term()
        while self._next() in ("+", "-", "*", "/"):
            self._take("mark")
            self._term()

    def _term(self) -> None:
        text = self._take("number", "name", "(")
        if text == "(":
            self._sum()
            self._take(")")
        elif text in FUNCTIONS:
            self._call(text)
        elif not text[0].isdigit():
            self._metric(text)

    def _call(self, name: str) -> None:
        labels, first = self._labels(), len(self.metrics)
        self._around.append(name)
        self._take("(")
        while self._next() != ")":
            self._sum()
            if self._next() == ",":
                self._take(",")
        self._take(")")
        self._around.pop()
        self.groups.append((labels, first, len(self.metrics)))

    def _labels(self) -> set[str]:
        """Of ``by (...)``."""
        found: set[str] = set()
        if self._next() == "by":
            self._take("by")
            self._take("(")
            while self._next() != ")":
                found.add(self._take("name"))
                if self._next() == ",":
                    self._take(",")
            self._take(")")
        return found

    def _metric(self, name: str) -> None:
        labels = set()
        if self._next() == "{":
            self._take("{")
            while self._next() != "}":
                labels.add(self._take("name"))
                self._take("match")
                self._take("text")
                if self._next() == ",":
                    self._take(",")
            self._take("}")
        around = tuple(self._around)
        if self._next() == "[$__rate_interval]":
            self._take("range")
            around += ("range",)
        self.metrics.append((name, labels, around))


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]


def variables() -> dict[str, str]:
    return {each["name"]: each["definition"] for each in dashboard()["templating"]["list"][1:]}


@pytest.fixture(scope="module")
def exported() -> dict[str, tuple[str, set[str]]]:
    """Name of each sample that can be scraped -> its kind, and its labels."""
    pytest.importorskip("prometheus_client", reason="prometheus_client missing")
    from hpcsync.observers.prometheus import FAMILIES
    from hpcsync.observers.series import Series

    series = Series(FAMILIES, dict.fromkeys(CONSTANT, "x"))
    for family in FAMILIES:
        tell = {"gauge": series.set, "counter": series.add, "histogram": series.observe}
        tell[family.kind](family.name, 1.0, *family.labels)
    return {
        sample.name: (metric.type, set(sample.labels))
        for metric in series.collect()
        for sample in metric.samples
    }


def test_every_expression_asks_for_what_is_exported(
    exported: dict[str, tuple[str, set[str]]],
) -> None:
    for where, expr in expressions():
        asked = Asked(expr)
        assert asked.metrics, where
        for name, labels, around in asked.metrics:
            assert name in exported, f"{where}: {name} is not exported"
            assert labels <= exported[name][1], f"{where}: {name} has not all of {labels}"
            rises = exported[name][0] in ("counter", "histogram")
            ranged = around[-2:] in (("rate", "range"), ("increase", "range"))
            total = name.endswith("_total") and "range" not in around
            assert ranged == rises or total, f"{where}: {name} as {around}"
            assert name.endswith("_bucket") == ("histogram_quantile" in around), where
        for labels, first, last in asked.groups:
            for name, _, _ in asked.metrics[first:last]:
                assert labels <= exported[name][1], f"{where}: {name} has not all of {labels}"


def test_everything_exported_is_on_the_dashboard(
    exported: dict[str, tuple[str, set[str]]],
) -> None:
    shown = {name for _, expr in expressions() for name, _, _ in Asked(expr).metrics}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported} == bases


def test_variables_are_defined_and_ask_for_what_is_exported(
    exported: dict[str, tuple[str, set[str]]],
) -> None:
    for name, query in variables().items():
        match = re.fullmatch(r"label_values\((\w+)(?:\{(.*)\})?, (\w+)\)", query)
        assert match, query
        labels = {match[3], *re.findall(r"(\w+)=~", match[2] or "")}
        assert labels <= exported[match[1]][1]
        assert match[3] == name
    used = set(re.findall(r"\$(\w+)", " ".join(expr for _, expr in expressions())))
    assert used <= {*variables(), "__rate_interval"}


def test_panels_do_not_overlap_and_ids_differ() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    "expr",
    ["max by (job (x)", "rate(x[5m])", "a{b=c}", "x y", "sum(", 'x{a="b"', "foo(x)"],
)
def test_the_parser_refuses_what_is_wrong(expr: str) -> None:
    with pytest.raises(AssertionError):
        Asked(expr)
