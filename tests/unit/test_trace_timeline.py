"""Pictures of a trace: what they hold, and that they can be read."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hpcsync.trace
from hpcsync.errors import UserError
from hpcsync.trace.events import EVENT, LANES
from tests import traces
from tools.tracing import lanes, page, picture, timeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return traces.make(folder, ranks=4, nodes=2, steps=4, codec="int8", clock_off={1: 2.0})


def drawn(run: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    timeline.arguments(parser)
    return timeline.run(parser.parse_args([str(run), *words]))


def content(text: str) -> dict[str, Any]:
    """The data inside a page."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match
    found: dict[str, Any] = json.loads(match[1])
    return found


def test_the_page_holds_every_span(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert drawn(run, "--html", str(path), "--steps", "2-3") == 0
    data = content(path.read_text())
    with hpcsync.trace.open(run) as trace:
        events = {rank: trace.aligned(rank, [2, 3]) for rank in trace.ranks}
        names = list(trace.names)
    first = min(each["start"].min() for each in events.values())
    assert data["names"] == names
    assert [each["name"] for each in data["lanes"]] == list(LANES)
    assert [step for _, step in data["steps"]] == [2, 3]
    for rank, mine in events.items():
        shown = mine[mine["lane"] != LANES.index("step")]
        rows = [row for row in data["rows"] if row["rank"] == rank]
        assert sum(len(row["start"]) for row in rows) == shown.shape[0]
        for row in rows:
            there = shown[shown["lane"] == LANES.index(row["label"])]
            there = there[np.argsort(there["start"], kind="stable")]
            assert row["start"] == ((there["start"] - first) // 100).tolist()
            assert row["end"] == ((there["end"] - first) // 100).tolist()
            for key in ("step", "bucket", "bytes", "name", "lane"):
                assert row[key] == there[key].tolist()
            assert max(row["slot"], default=0) < row["depth"]


def test_the_page_stands_alone(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    drawn(run, "--html", str(path))
    text = path.read_text()
    for foreign in ("http:", "https:", "src=", "href=", "@import", "url(", "fetch(", "import("):
        assert foreign not in text
    assert "@TITLE@" not in text
    assert "@DATA@" not in text


def test_names_cannot_break_out_of_the_page() -> None:
    row = lanes.Row(0, 0, "data", np.zeros(0, EVENT), np.zeros(0, np.int64), 1)
    text = page.page([row], [], ["<b>&", "run </script>"], ["</script><script>alert(1)"])
    assert text.count("</script>") == 2
    assert "&lt;b&gt;&amp;" in text
    assert content(text)["names"] == ["</script><script>alert(1)"]


def test_the_page_s_script_is_right_javascript(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node missing: apt-get install nodejs")
    template = (Path(page.__file__).parent / "page.html").read_text()
    script = tmp_path / "page.js"
    script.write_text(re.findall(r"<script>(.*?)</script>", template, re.S)[0])
    subprocess.run([node, "--check", str(script)], check=True, timeout=60)


def test_many_ranks_have_two_rows_each(tmp_path: Path) -> None:
    folder = traces.make(tmp_path / "run", ranks=16, nodes=4, steps=2)
    drawn(folder, "--html", str(tmp_path / "page.html"))
    rows = content((tmp_path / "page.html").read_text())["rows"]
    assert [row["label"] for row in rows] == ["compute", "exchange"] * 16
    drawn(folder, "--html", str(tmp_path / "page.html"), "--detail", "lanes", "--ranks", "3")
    rows = content((tmp_path / "page.html").read_text())["rows"]
    assert {row["rank"] for row in rows} == {3}
    assert len(rows) > 6


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=40))
def test_spans_in_one_place_do_not_overlap(spans: list[tuple[int, int]]) -> None:
    spans.sort()
    start = np.array([low for low, _ in spans], np.int64)
    end = np.array([low + long for low, long in spans], np.int64)
    places = lanes.slots(start, end)
    for place in np.unique(places):
        mine = places == place
        assert (start[mine][1:] >= end[mine][:-1]).all()
    deepest = max((int(((start <= at) & (at < end)).sum()) for at in range(81)), default=0)
    assert places.max(initial=-1) + 1 <= max(deepest, 1) + int((start == end).sum())


def test_colours_can_be_told_from_white() -> None:
    assert set(lanes.COLOURS) == set(LANES)
    assert len(set(lanes.COLOURS.values())) == len(LANES)
    for colour in lanes.COLOURS.values():
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [
            each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
        ]
        light = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
        assert 1.05 / (light + 0.05) >= 3, colour


def test_a_picture_is_drawn(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib missing: pip install matplotlib")
    path = tmp_path / "out.png"
    assert drawn(run, "--png", str(path)) == 0
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    wide, tall = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    assert wide > 1500
    assert tall > 600
    with pytest.raises(UserError, match="--png"):
        drawn(run, "--png", str(tmp_path / "none" / "out.png"))


def test_a_picture_can_be_an_svg(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib missing: pip install matplotlib")
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        assert drawn(run, "--svg", str(path)) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    root = ElementTree.parse(paths[0]).getroot()
    assert root.tag.endswith("}svg")
    texts = {"".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"forward", "backward", "wire.rail", "rank 3  node1"} <= texts
    assert not (run / "timeline.png").exists()
    with pytest.raises(UserError, match=r"must end in \.svg"):
        drawn(run, "--svg", str(tmp_path / "a.png"))


def test_both_are_written_beside_the_trace_if_neither_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib missing: pip install matplotlib")
    folder = traces.make(tmp_path / "run", ranks=1, nodes=1, steps=2)
    assert drawn(folder) == 0
    assert (folder / "timeline.png").exists()
    assert (folder / "timeline.html").exists()
    assert "timeline.png" in capsys.readouterr().out


def test_without_matplotlib_one_line_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib") as caught:
        drawn(run, "--png", str(tmp_path / "out.png"))
    assert "\n" not in str(caught.value)
    assert drawn(run, "--html", str(tmp_path / "out.html")) == 0


def test_too_many_ranks_for_a_picture_are_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib missing: pip install matplotlib")
    none = np.zeros(0, EVENT)
    rows = [
        lanes.Row(rank, 0, "compute", none, np.zeros(0, np.int64), 1)
        for rank in range(picture.MOST_RANKS + 1)
    ]
    with pytest.raises(UserError, match="--ranks"):
        picture.draw(tmp_path / "out.png", rows, [], ["", ""])
