"""The files of the replay log: records, slots, chains; torn, cut, flipped."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpcsync.checkpoint.replay import chain, log, records
from hpcsync.checkpoint.replay.background import Background
from hpcsync.checkpoint.replay.records import HEAD_BYTES, Writer, scan
from hpcsync.checkpoint.replay.slots import Slots
from hpcsync.config import CommConfig

IDENTITY = {"lineage": "abc", "rank": 0, "nodes": [[0]], "setup": "1"}


def test_logs_of_versions_without_a_transport_of_rails_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hash of what those versions hashed, as long as the key says nothing."""
    layer = nn.Linear(2, 3)
    engine: Any = SimpleNamespace(optimizer=torch.optim.SGD(layer.parameters()))
    reducer: Any = SimpleNamespace(parameters=dict(layer.named_parameters()), compression=None)
    hashed: list[Any] = []
    monkeypatch.setattr(
        log, "json", SimpleNamespace(dumps=lambda told, **_: str(hashed.append(told)))
    )
    for rail in ("auto", "mpi_host"):
        log._setup(engine, reducer, CommConfig(rail_transport=rail))
    assert ["rail_transport" in told["comm"] for told in hashed] == [False, True]


def data(step: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(step).integers(0, 256, count, dtype=np.uint8)


def write(path: Path, begin: int, stop: int, count: int = 700, **identity: Any) -> list[int]:
    """A log of the steps after ``begin`` up to ``stop``; where each record ends."""
    writer = Writer(path)
    writer.begin()
    ends = [writer.finish(begin, chain.header(IDENTITY | identity, begin))]
    writer.begin()
    ends.append(writer.finish(begin + 1, {"kind": "layout"}))
    for step in range(begin + 1, stop + 1):
        writer.begin()
        writer.add([data(step, count), data(-step % 97, 3)])
        exchange = {"exchange": {"order": [step]}} if step == begin + 1 else {}
        ends.append(writer.finish(step, {"kind": "step", "step": step, **exchange}))
    writer.close()
    return ends


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 700_000), max_size=6), max_size=4))
def test_records_read_as_written(tmp_path_factory: Any, sizes: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    writer = Writer(path)
    wanted = []
    for step, each in enumerate(sizes):
        arrays = [data(step + 7 * index, size) for index, size in enumerate(each)]
        writer.begin()
        writer.add([np.zeros(5, np.uint8)])
        writer.begin()  # the record before was not ended
        writer.add(arrays)
        assert writer.finish(step, {"sizes": each}) == writer._start
        wanted.append(np.concatenate([np.empty(0, np.uint8), *arrays]))
    writer.close()
    found, problem = scan(path)
    assert not problem
    assert [record.meta["sizes"] for record in found] == sizes
    assert [record.step for record in found] == list(range(len(sizes)))
    for record, each in zip(found, wanted, strict=True):
        assert np.array_equal(record.read(), each)


def test_many_small_arrays_and_short_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: real(fd, [b"".join(parts)[:1000]], at))
    arrays = [data(index, 7) for index in range(2000)]
    writer = Writer(tmp_path / "log")
    writer.begin()
    writer.add(arrays)
    writer.finish(1, {})
    writer.close()
    (record,), problem = scan(tmp_path / "log")
    assert not problem
    assert np.array_equal(record.read(), np.concatenate(arrays))


@settings(max_examples=250)
@given(st.data())
def test_a_log_cut_anywhere_ends_there(tmp_path_factory: Any, draw: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = chain.log_path(folder, 0, 10)
    ends = write(path, 10, 15)
    size = draw.draw(st.integers(0, ends[-1] - 1))
    os.truncate(path, size)
    found = chain.follow(folder, 0, IDENTITY, 10)
    whole = sum(end <= size for end in ends[2:])
    assert list(found.steps) == list(range(11, 11 + whole))
    if size not in ends:
        assert "cut off" in found.problem or not size
    for step, logged in found.steps.items():
        assert np.array_equal(logged.record.read()[:700], data(step, 700))


@settings(max_examples=500)
@given(st.data())
def test_a_flipped_bit_ends_the_log(tmp_path_factory: Any, draw: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = chain.log_path(folder, 0, 10)
    ends = write(path, 10, 15)
    at = draw.draw(st.integers(0, 8 * ends[-1] - 1))
    content = bytearray(path.read_bytes())
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)
    found = chain.follow(folder, 0, IDENTITY, 10)
    assert list(found.steps) == list(range(11, 11 + sum(8 * end <= at for end in ends[2:])))
    assert found.problem
    for step, logged in found.steps.items():
        assert np.array_equal(logged.record.read()[:700], data(step, 700))


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_no_garbage_is_believed(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "log"
    path.write_bytes(content)
    found, problem = scan(path)
    assert not found
    assert bool(problem) == bool(content)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert scan(tmp_path / "fifo") == ([], "it is no file")
    write(tmp_path / "log", 0, 1)
    (tmp_path / "link").symlink_to(tmp_path / "log")
    with pytest.raises(OSError):
        scan(tmp_path / "link")


@pytest.mark.parametrize("meta", [b"[" * 100_000, b"3", b"\xff", b'{"a": }'])
def test_meta_that_is_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meta: Any) -> None:
    monkeypatch.setattr(records.json, "dumps", lambda _: meta.decode("latin-1"))
    writer = Writer(tmp_path / "log")
    writer.begin()
    writer.finish(3, {})
    writer.close()
    monkeypatch.undo()
    found, problem = scan(tmp_path / "log")
    assert not found
    assert problem == "the record of step 3 is no JSON object at byte 0"


def test_files_follow_each_other(tmp_path: Path) -> None:
    for begin, stop in ((10, 13), (13, 15), (15, 15), (16, 18)):
        write(chain.log_path(tmp_path, 0, begin), begin, stop)
    assert list(chain.logs(tmp_path, 0)) == [10, 13, 15, 16]
    found = chain.follow(tmp_path, 0, IDENTITY, 10)
    assert list(found.steps) == [11, 12, 13, 14, 15]
    assert [each.exchange["order"] for each in found.steps.values()] == [[11]] * 3 + [[14]] * 2
    assert list(chain.follow(tmp_path, 0, IDENTITY, 13).steps) == [14, 15]
    missing = chain.follow(tmp_path, 0, IDENTITY, 12)
    assert not missing.steps
    assert missing.problem == "it begins at step 16, not at step 12"
    assert chain.follow(tmp_path / "none", 0, IDENTITY, 0).problem == "there is none"


@pytest.mark.parametrize(
    ("identity", "word"),
    [
        ({"lineage": "other"}, "run"),
        ({"nodes": [[0], [1]]}, "placement of ranks"),
        ({"setup": "2"}, "model, optimizer, comm or compress section"),
        ({"version": 99}, "version"),
    ],
)
def test_the_log_of_another_run(tmp_path: Path, identity: dict[str, Any], word: str) -> None:
    write(chain.log_path(tmp_path, 0, 0), 0, 3, **identity)
    found = chain.follow(tmp_path, 0, IDENTITY, 0)
    assert not found.steps
    assert found.problem == f"rank-00000-from-00000000.log: it is of another {word}"


def test_a_log_goes_on_behind_a_step(tmp_path: Path) -> None:
    path = chain.log_path(tmp_path, 0, 0)
    write(path, 0, 5)
    last = chain.follow(tmp_path, 0, IDENTITY, 0).steps[3].record
    writer = Writer(path, last.stop)
    for step in (4, 5, 6):
        writer.begin()
        writer.finish(step, {"kind": "step"})
    writer.close()
    assert list(chain.follow(tmp_path, 0, IDENTITY, 0).steps) == [1, 2, 3, 4, 5, 6]


@settings(max_examples=200)
@given(st.data())
def test_one_slot_is_always_whole(tmp_path_factory: Any, draw: st.DataObject) -> None:
    """However much of a slot was written when the process died."""
    folder = tmp_path_factory.mktemp("slots")
    paths = chain.slot_paths(folder, 3)
    slots = Slots(paths)
    last = draw.draw(st.integers(2, 5))
    before = b""
    for step in range(1, last + 1):
        before = paths[step % 2].read_bytes() if step > 2 else b""
        slots.write(step, [data(step, 400 + 10 * step)], {"step": step})
    slots.close()
    after = paths[last % 2].read_bytes()
    written = draw.draw(st.integers(0, len(after)))
    # All but the head, and the head at last.
    body = max(written - HEAD_BYTES, 0)
    torn = bytearray(before.ljust(len(after), b"\0"))
    torn[HEAD_BYTES : HEAD_BYTES + body] = after[HEAD_BYTES : HEAD_BYTES + body]
    if written == len(after):
        torn[:HEAD_BYTES] = after[:HEAD_BYTES]
    paths[last % 2].write_bytes(torn)
    found = Slots(paths).read()
    assert last - 1 in found
    assert set(found) <= {last - 2, last - 1, last}
    for step, record in found.items():
        assert np.array_equal(record.read(), data(step, 400 + 10 * step))


def test_a_full_disk_is_an_error_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = chain.log_path(tmp_path, 0, 0)
    ends = write(path, 0, 3)
    writer = Writer(path, ends[-1])
    real = os.pwritev
    room = [300]

    def full(fd: int, parts: Any, at: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(fd, [b"".join(parts)[: room[0]]], at)
        room[0] -= done
        return done

    monkeypatch.setattr(os, "pwritev", full)
    writer.begin()
    with pytest.raises(OSError):
        writer.add([data(0, 1 << 19)])
    writer.close()
    assert list(chain.follow(tmp_path, 0, IDENTITY, 0).steps) == [1, 2, 3]


def test_files_of_ranks_that_are_no_more(tmp_path: Path) -> None:
    for rank in (0, 1, 2, 11):
        write(chain.log_path(tmp_path, rank, 0), 0, 1)
        for path in chain.slot_paths(tmp_path, rank):
            path.touch()
    (tmp_path / "rank-00007-from-x.log").touch()
    names = {path.name for path in chain.strangers(tmp_path, 2)}
    assert names == {
        f"rank-{rank:05d}-{what}"
        for rank in (2, 11)
        for what in ("from-00000000.log", "slot-0", "slot-1")
    }


def test_a_name_that_is_used_again_is_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its file still waits to be deleted or is being deleted."""
    first, second, third = (tmp_path / name for name in "abc")
    for path in (first, second, third):
        path.write_text("old")
    begun, gate, real = threading.Event(), threading.Event(), Path.unlink

    def slow(path: Path, missing_ok: bool = False) -> None:
        begun.set()
        assert gate.wait(60)
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", slow)
    background = Background(list)
    background.remove([first, second, third])
    assert begun.wait(60)
    background.spare(second)
    second.write_text("new")
    threading.Timer(0.05, gate.set).start()
    background.spare(first)
    assert not first.exists()
    first.write_text("new")
    background.close()
    assert [path.exists() for path in (first, second, third)] == [True, True, False]
