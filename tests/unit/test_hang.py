"""Dumps of ranks that hang, and what they say together: faults planted by hand."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from hpcsync.errors import UserError
from hpcsync.trace.analysis.stuck import Report, render, report, shown
from hpcsync.trace.events import EVENT, LANE, NAMES
from hpcsync.trace.hang import (
    Dump,
    Frame,
    Stack,
    Under,
    load,
    save,
    stacks,
    waited_for,
)
from tools.tracing import hang as command

TRAIN = Frame("/home/me/hpcsync/train.py", 212, "step")
ENGINE = Frame("/home/me/hpcsync/engine.py", 120, "_backward")
TORCH = Frame("/venv/lib/python3.11/site-packages/torch/_tensor.py", 600, "backward")
WAIT = Frame("/home/me/hpcsync/collectives/progress.py", 151, "wait_until")
DOZE = Frame("/home/me/hpcsync/collectives/progress.py", 210, "_doze")
MODEL = Frame("/home/me/model.py", 88, "forward")
AGREE = Frame("/home/me/hpcsync/train.py", 286, "agree")
SCALAR = Frame("/home/me/hpcsync/runtime.py", 120, "allreduce_scalar")
CONTROL = Frame("/home/me/hpcsync/runtime.py", 106, "wait")


def events(*spans: tuple[str, str, int, int]) -> Any:
    """Events of (name, lane, start, end) in step 41."""
    found = np.zeros(len(spans), EVENT)
    for row, (name, lane, start, end) in zip(found, spans, strict=True):
        row["name"], row["lane"] = NAMES.index((name, lane)), LANE[lane]
        row["start"], row["end"], row["step"], row["bucket"] = start, end, 41, -1
    return found


def dump(rank: int, ranks: int = 4, **changes: Any) -> Dump:
    given: dict[str, Any] = {
        "rank": rank,
        "ranks": ranks,
        "node": rank // 2,
        "host": f"n{rank // 2}",
        "pid": 100 + rank,
        "time": 1e9,
        "reason": "timeout",
        "step": 41,
        "run_id": "abcd",
        "clock_ns": 10_000_000_000,
        "stacks": (Stack(thread="MainThread", frames=(TRAIN, ENGINE, TORCH, WAIT, DOZE)),),
    }
    return Dump(**{**given, **changes})


def waiting(
    rank: int, peers: Sequence[int], ranks: int = 4, bucket: int = 3, **changes: Any
) -> Dump:
    """A rank in bucket 3 that waits for others, in words as transports give them."""
    words = f"mpi_host: ring waits at step 1 of 6 for 4096 bytes from rank {peers[0]}"
    words += "".join(f", 8 bytes to rank {peer}" for peer in peers[1:])
    found = [
        Under(collective=f"bucket {bucket}", sequence=41, level="rail", waits=words),
        Under(collective=f"bucket {bucket + 7}", sequence=41, level="not started"),
    ]
    reached = {f"bucket {index}": 41 for index in range(bucket + 8)}
    return dump(rank, ranks, **{"active": tuple(found), "reached": reached, **changes})


def sleeping(rank: int, ranks: int = 4, **changes: Any) -> Dump:
    """A rank that is still in its forward pass."""
    given = {
        "stacks": (Stack(thread="MainThread", frames=(TRAIN, ENGINE, TORCH, MODEL)),),
        "reached": {f"bucket {index}": 40 for index in range(11)},
        "events": events(("batch", "data", 1, 4_000_000_000)),
    }
    return dump(rank, ranks, **{**given, **changes})


# Dumps


def test_a_dump_comes_back_as_it_was(tmp_path: Path) -> None:
    before = waiting(2, [0, 3], offset_ns=-5, events=events(("transfer", "wire.rail", 3, 9)))
    assert save(before, tmp_path / "trace") == tmp_path / "trace" / "hang-2.json"
    (after,), problems = load(tmp_path)
    assert problems == []
    assert np.array_equal(after.events, before.events)
    plain = dataclasses.replace(before, events=after.events)
    assert after == plain


def test_a_file_tells_names_rather_than_numbers(tmp_path: Path) -> None:
    path = save(sleeping(1), tmp_path)
    found = json.loads(path.read_text())
    assert (found["format"], found["version"], found["run_id"]) == ("hpcsync-hang", 1, "abcd")
    columns, rows = found["events"]["columns"], found["events"]["rows"]
    assert dict(zip(columns, rows[0], strict=True))["lane"] == "data"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not readable"),
        ("[]", "no dump of hpcsync"),
        ('{"format": "hpcsync-hang", "version": 99}', "newer than this hpcsync"),
        ('{"format": "hpcsync-hang", "version": 1}', "incomplete"),
        ('{"format": "hpcsync-hang", "version": 1, "rank": {}}', "incomplete"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path, text: str, told: str) -> None:
    save(dump(0), tmp_path)
    (tmp_path / "hang-1.json").write_text(text)
    dumps, (problem,) = load(tmp_path)
    assert [each.rank for each in dumps] == [0]
    assert told in problem
    assert "\n" not in problem


def test_dumps_of_an_older_run_are_left_out(tmp_path: Path) -> None:
    save(dump(0, run_id="old", time=5.0), tmp_path)
    save(dump(1), tmp_path)
    dumps, problems = load(tmp_path)
    assert [each.rank for each in dumps] == [1]
    assert problems == ["rank 0: its dump is of another run; left out"]


def test_a_folder_without_dumps_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no dumps in it"):
        load(tmp_path)
    (tmp_path / "hang-0.json").write_text("x")
    with pytest.raises(UserError, match=r"hang-0.json: not readable"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("4096 bytes from rank 3, 12 bytes to rank 5", (3, 5)),
        ("mpi_host: waits for coded messages from rank 3, 15", (3, 15)),
        ("waits for rank 2 to reach step 4 of run 7 (it is at step 3 of run 7)", (2,)),
        ("mpi_host: MPI's own allreduce of 80 bytes is not complete", ()),
    ],
)
def test_the_ranks_that_a_text_names(words: str, ranks: tuple[int, ...]) -> None:
    assert waited_for(words) == ranks


def test_stacks_of_all_threads() -> None:
    ready, over = threading.Event(), threading.Event()

    def helper() -> None:
        ready.set()
        over.wait(10)

    thread = threading.Thread(target=helper, name="a helper")
    thread.start()
    ready.wait(10)
    try:
        found = stacks()
    finally:
        over.set()
        thread.join()
    assert found[0].thread == "MainThread"
    assert found[0].frames[-1].function == "test_stacks_of_all_threads"
    (other,) = (each for each in found if each.thread == "a helper")
    assert "helper" in [frame.function for frame in other.frames]


def test_a_signal_handlers_frame_stands_for_its_thread() -> None:
    def interrupted() -> FrameType:
        return sys._getframe()

    assert stacks(interrupted())[0].frames[-1].function == "interrupted"


def test_an_exceptions_frames_stand_for_its_thread() -> None:
    """From the outermost frame to where it was raised, though it is caught half way."""

    def gives_up() -> None:
        raise TimeoutError

    def catches() -> tuple[Frame, ...]:
        try:
            gives_up()
        except TimeoutError as error:
            return stacks(error.__traceback__)[0].frames
        raise AssertionError

    names = [frame.function for frame in catches()]
    here = names.index("test_an_exceptions_frames_stand_for_its_thread")
    assert names[here:][-2:] == ["catches", "gives_up"]
    assert here > 0


# What they say together


def test_a_rank_that_sleeps_in_forward_is_named() -> None:
    found = report([waiting(0, [2]), waiting(1, [0]), sleeping(2), waiting(3, [2])], 4)
    assert (found.stuck, found.sequence) == ("bucket 3", 41)
    assert found.inside == (0, 1, 3)
    assert found.missing == found.blamed == (2,)
    assert found.also == ("bucket 10",)
    assert found.places[0].ranks == (2,)
    assert found.places[0].at == "outside of communication"
    assert found.places[0].last == "batch of step 41, 6.0 s before"
    assert found.places[1].waits_for == (0, 2)
    text = "\n".join(render(found))
    assert "stuck: bucket 3 (its run 41); 3 ranks in it: 0-1, 3" in text
    assert "missing: rank 2: not come to it" in text
    assert "me/model.py:88 forward < hpcsync/engine.py:120 _backward" in text
    assert "torch" not in text


def test_a_bucket_held_back_on_one_rank_is_named() -> None:
    """It went on with others: only that bucket it has not begun."""
    late = waiting(2, [0], bucket=4, reached={"bucket 3": 40, "bucket 4": 41})
    found = report([waiting(0, [2]), waiting(1, [2]), late, waiting(3, [2])], 4)
    assert (found.stuck, found.missing) == ("bucket 3", (2,))


def test_a_rank_that_is_past_it_is_not_missing() -> None:
    past = sleeping(3, reached={"bucket 3": 41})
    found = report([waiting(0, [2]), waiting(1, [2]), sleeping(2), past], 4)
    assert found.missing == (2,)


def test_without_counts_the_step_decides() -> None:
    ahead = sleeping(3, reached={}, step=42)
    found = report([waiting(0, [2]), sleeping(2, reached={}), ahead], 3)
    assert found.missing == (2,)


def test_ranks_that_died_are_named() -> None:
    found = report([waiting(rank, [5], 8) for rank in (0, 1, 2, 3, 7)], 8)
    assert found.absent == found.blamed == (4, 5, 6)
    assert "missing: ranks 4-6: left no dump" in "\n".join(render(found))


def test_where_all_have_come_who_waits_for_nobody_holds_them_up() -> None:
    idle = waiting(2, [0], active=(Under(collective="bucket 3", sequence=41, level="rail"),))
    found = report([waiting(0, [1]), waiting(1, [2]), idle, waiting(3, [0])], 4)
    assert (found.missing, found.holding, found.ring) == ((), (2,), ())
    assert found.places[0].ranks == (2,)


def test_a_lost_message_is_told_as_such() -> None:
    found = report([waiting(0, [1]), waiting(1, [0]), waiting(2, [0]), waiting(3, [1])], 4)
    assert (found.blamed, found.ring) == ((), (0, 1))
    assert "ranks 0-1 wait for each other: a message is lost" in "\n".join(render(found))


def test_a_control_message_is_known_by_its_stack() -> None:
    agreeing = (Stack(thread="MainThread", frames=(TRAIN, AGREE, SCALAR, CONTROL)),)
    found = report([dump(0, stacks=agreeing), sleeping(1), dump(2, stacks=agreeing)], 3)
    assert (found.stuck, found.inside) == ("allreduce_scalar of agree", (0, 2))
    assert found.missing == (1,)
    assert found.holding == ()


def test_who_was_only_asked_to_dump_gives_no_reason() -> None:
    found = report([waiting(0, [1], reason="request"), sleeping(1, reason="SIGQUIT")], 2)
    assert found.reasons == ("SIGQUIT",)
    assert report([sleeping(0, reason="request")], 2).reasons == ("request",)


def test_nothing_is_stuck_where_all_compute() -> None:
    found = report([sleeping(rank, reason="SIGQUIT") for rank in range(4)], 4)
    assert (found.stuck, found.blamed, found.reasons) == ("", (), ("SIGQUIT",))
    assert len(found.places) == 1
    assert "nothing is stuck" in "\n".join(render(found))


def test_ranks_that_wait_in_the_same_place_stand_together() -> None:
    """Whatever round of it they were caught in, and whomever they wait for."""
    other = (Stack(thread="MainThread", frames=(TRAIN, ENGINE, TORCH, WAIT)),)
    found = report([waiting(0, [3]), waiting(1, [2], stacks=other), waiting(2, [3])], 4)
    assert [place.ranks for place in found.places] == [(0, 1, 2)]


def test_the_innermost_frame_is_shown_even_if_it_is_foreign() -> None:
    assert shown((TRAIN, TORCH)) == (TRAIN, TORCH)
    assert shown((TRAIN, TORCH, MODEL)) == (TRAIN, MODEL)
    assert shown(()) == ()


def page(found: Report) -> list[str]:
    lines = render(found)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    return lines


def test_512_ranks_fit_on_a_screen() -> None:
    dumps = [waiting(rank, [77], 512) for rank in range(512) if rank not in (77, 300)]
    lines = page(report([*dumps, sleeping(77, 512)], 512))
    assert "stuck: bucket 3 (its run 41); 510 ranks in it: 0-76, 78-299, 301-511" in lines
    assert any(line.startswith("missing: rank 77") for line in lines)
    assert any(line.startswith("missing: rank 300: left no dump") for line in lines)


def test_512_ranks_at_as_many_places_fit_on_a_screen() -> None:
    dumps = []
    for rank in range(0, 512, 2):
        frames = (*[TRAIN] * 3, Frame(f"/home/me/{'x' * 200}.py", 1, f"f{rank}"))
        dumps.append(sleeping(rank, 512, stacks=(Stack(thread="MainThread", frames=frames),)))
    lines = page(report(dumps, 512))
    assert "more places of" in lines[-1]


# The command


def run(folder: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    return command.run(parser.parse_args([str(folder), *words]))


@pytest.fixture
def hung(tmp_path: Path) -> Path:
    for each in (waiting(0, [2]), waiting(1, [2]), sleeping(2)):
        save(each, tmp_path / "trace")
    return tmp_path


def test_the_command_prints_the_report(hung: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hung / "trace" / "hang-3.json").write_text("{")
    assert run(hung) == 0
    out, err = capsys.readouterr()
    assert "missing: rank 2: not come to it" in out
    assert "missing: rank 3: left no dump" in out
    assert err.startswith("trace: warning: ")
    assert err.count("\n") == 1


def test_the_command_prints_json_and_csv(hung: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(hung, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stuck"], found["missing"], found["absent"]) == ("bucket 3", [2], [3])
    assert [place["ranks"] for place in found["places"]] == ["2", "0-1"]
    assert run(hung, "--csv") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "table,ranks,count,at,waits_for,last,stack"


def test_the_command_shows_one_rank(hung: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(hung, "--rank", "2") == 0
    out = capsys.readouterr().out
    assert "rank 2 of 4, node 1, n1, process 102: timeout at step 41" in out
    assert "/home/me/model.py:88 forward" in out
    assert "batch" in out
    with pytest.raises(UserError, match="no dump of rank 3; there are 0-2"):
        run(hung, "--rank", "3")
