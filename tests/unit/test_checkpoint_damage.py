"""Damaged checkpoints, and strangers': all found, told by file and dataset, never loaded."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsync import checkpoint
from hpcsync.checkpoint import manifest as manifests
from hpcsync.checkpoint import parsing, reader
from hpcsync.errors import CheckpointError, DamagedError
from tests.checkpoints import example, make, same

CASES = 1000
STATE = example(ranks=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoints"), 100, *STATE)


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    target = tmp_path / made.name
    shutil.copytree(made, target)
    return target


def problems(folder: Path) -> list[str]:
    """What is told of a checkpoint; nothing if it opens and verifies."""
    try:
        with checkpoint.open(folder) as found:
            return found.verify()
    except DamagedError as error:
        return list(error.problems)


def loaded(folder: Path) -> list[Any]:
    """All trees of a checkpoint as a run takes them, none if damage is told."""
    try:
        with checkpoint.open(folder) as found:
            return [found.common(), *(found.own(rank) for rank in range(found.manifest.ranks))]
    except DamagedError:
        return []


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def blank(data: bytearray, draw: random.Random) -> None:
    """A stretch that never reached the disk."""
    filled = [at for at, byte in enumerate(data) if byte]
    at = draw.choice(filled)
    data[at : at + 512] = bytes(len(data[at : at + 512]))


def lengthen(data: bytearray, draw: random.Random) -> None:
    data += bytes(draw.randint(1, 5000))


def test_whatever_is_cut_or_flipped_is_found(made: Path) -> None:
    draw = random.Random(1)
    files = sorted(made.iterdir())
    assert len(files) == 4
    harms = [cut, flip, flip, blank, lengthen]
    for case in range(CASES):
        file, harm = files[case % len(files)], harms[case // len(files) % len(harms)]
        whole = file.read_bytes()
        data = bytearray(whole)
        harm(data, draw)
        assert data != whole
        file.write_bytes(data)
        told = problems(made)
        assert told, f"case {case}: {harm.__name__} of {file.name} was not found"
        assert all(file.name in each for each in told), told
        trees = loaded(made)
        assert not trees or same(trees, [STATE[0], *STATE[1]])
        file.write_bytes(whole)
    assert problems(made) == []


def test_a_flipped_bit_is_told_with_its_dataset(copied: Path) -> None:
    with checkpoint.open(copied) as found:
        piece = found.manifest.tensors["model/embed.weight"].pieces[0]
    data = bytearray((copied / piece.file).read_bytes())
    data[piece.offset] ^= 1
    (copied / piece.file).write_bytes(data)
    assert problems(copied) == [
        f"{copied}/{piece.file}: dataset model/embed.weight: the checksum does not fit"
    ]
    with checkpoint.open(copied) as found:
        with pytest.raises(DamagedError, match=r"dataset model/embed\.weight"):
            found.common()
        assert same(found.common("sampler")["sampler"], STATE[0]["sampler"])


@pytest.mark.parametrize("name", ["manifest.json", "index.h5", "rank-00001.h5"])
@pytest.mark.parametrize("kind", ["missing", "empty", "link", "pipe", "folder"])
def test_files_that_are_none(copied: Path, name: str, kind: str) -> None:
    file = copied / name
    kept = file.rename(copied.parent / "kept")
    {
        "missing": lambda: None,
        "empty": file.touch,
        "link": lambda: file.symlink_to(kept),
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
    }[kind]()
    told = problems(copied)
    assert len(told) == 1
    assert name in told[0]
    assert loaded(copied) == []


def test_files_of_another_checkpoint_are_found(copied: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", 100, *example(ranks=2, seed=1))
    shutil.copy(other / "rank-00001.h5", copied / "rank-00001.h5")
    told = problems(copied)
    assert any("rank-00001.h5: dataset" in each for each in told)


def test_a_file_cut_while_it_is_read(copied: Path) -> None:
    with checkpoint.open(copied) as found:
        os.truncate(copied / "rank-00000.h5", 100)
        with pytest.raises(DamagedError, match=r"rank-00000\.h5: dataset .*: it ends at"):
            found.common()
        assert found.verify() != []


def test_what_may_pass_is_no_damage(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be read for other reasons must not be set aside."""

    def preadv(*_: Any) -> int:
        raise OSError(116, "Stale file handle")

    with checkpoint.open(copied) as found:
        monkeypatch.setattr(reader.os, "preadv", preadv)
        with pytest.raises(CheckpointError, match="cannot be read: Stale file handle") as error:
            found.common()
    assert not isinstance(error.value, DamagedError)


def test_files_are_opened_when_read_and_few_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of thousands of ranks has more files than a process may have open."""
    ranks = 9
    folder = make(tmp_path, 100, *example(ranks=ranks))
    monkeypatch.setattr(reader, "_OPEN", 3)
    with checkpoint.open(folder) as found:
        assert found._files._handles == {}
        for rank in (0, *range(ranks), 0):
            found.own(rank)
            assert len(found._files._handles) <= 3
        assert list(found._files._handles)[-1] == "rank-00000.h5"
        assert found.verify() == []
        assert same(found.common(), STATE[0])


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as error:
        checkpoint.open(tmp_path / "none")
    assert not isinstance(error.value, DamagedError)


def sign(read: Any) -> bytes:
    """A manifest as a stranger would write it: its checksum is right."""
    read = {key: value for key, value in read.items() if key != "checksum"}
    body = json.dumps(read)[:-1].encode() + b",\n"
    return body + f'"checksum": "{manifests.digest(body)}"\n}}\n'.encode()


def put(folder: Path, read: Any) -> None:
    (folder / "manifest.json").write_bytes(sign(read))


def plain(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def tensor(read: Any, name: str = "model/embed.weight") -> Any:
    return next(each for each in read["tensors"] if each["name"] == name)


def piece(read: Any, name: str = "model/embed.weight") -> Any:
    return tensor(read, name)["pieces"][0]


# What a stranger alters, and what is told.
HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "huge": (lambda m: tensor(m).update(shape=[1 << 40, 1 << 40]), "too large"),
    "larger than its bytes": (lambda m: tensor(m).update(shape=[33, 700]), "bytes are not"),
    "empty but huge": (lambda m: tensor(m).update(shape=[0, 1 << 61]), "too large"),
    "negative": (lambda m: tensor(m).update(shape=[-1, 7]), "no number"),
    "float size": (lambda m: tensor(m).update(shape=[33.0, 7]), "no number"),
    "true size": (lambda m: tensor(m, "model/norm.count").update(shape=[True]), "no number"),
    "dimensions": (lambda m: tensor(m).update(shape=[1] * 40), "32 dimensions"),
    "dtype": (lambda m: tensor(m).update(dtype="object"), "dtype object is not known"),
    "other dtype": (lambda m: tensor(m).update(dtype="float64"), "bytes are not"),
    "offset": (lambda m: piece(m).update(offset=1 << 61), "beyond the end"),
    "negative offset": (lambda m: piece(m).update(offset=-8), "no number"),
    "overlap": (
        lambda m: piece(m).update(offset=piece(m, "optimizer/exp_avg/embed.weight")["offset"]),
        "another's, too",
    ),
    "rows twice": (lambda m: tensor(m)["pieces"].append(piece(m)), "missing or twice"),
    "rows missing": (lambda m: tensor(m)["pieces"].clear(), "0 of 33 rows"),
    "path": (lambda m: m["files"][0].update(name="../../etc/passwd"), "not a name"),
    "absolute": (lambda m: m["files"][0].update(name="/dev/zero"), "not a name"),
    "file twice": (lambda m: m["files"].append(m["files"][0]), "or twice"),
    "file not listed": (lambda m: piece(m).update(file="rank-00009.h5"), "not listed"),
    "tensor twice": (lambda m: m["tensors"].append(tensor(m)), "or twice"),
    "tensor missing": (lambda m: m["tensors"].pop(), "not those of the states"),
    "tensor unnamed": (lambda m: m["common"].clear(), "not those of the states"),
    "shared tensor": (
        lambda m: m["common"].update(more={"$tensor": "model/embed.weight"}),
        "not those of the states",
    ),
    "another's": (lambda m: m["own"].reverse(), "a tensor of another's"),
    "ranks": (lambda m: m.update(ranks=3), "not one state a rank"),
    "nodes": (lambda m: m.update(nodes=[[0, 0]]), "not each rank once"),
    "nodes of many": (lambda m: m.update(nodes=[[0, 1, 2]]), "no number"),
    "key": (lambda m: m.update(more=1), "one too many"),
    "code": (lambda m: m["common"].update({"$reduce": ["os.system", "true"]}), "not understood"),
    "terminal": (lambda m: tensor(m).update(name="\x1b[2J"), "no name, or twice"),
    "checksum": (lambda m: piece(m).update(xxh3="0" * 31), "no checksum"),
    "versions": (lambda m: m.update(versions=["1"]), "versions"),
    "config": (lambda m: m.update(config=None), "config: no text"),
    "step": (lambda m: m.update(step="1"), "step: no number"),
    "format": (lambda m: m.update(format="other"), "another format"),
    "old": (lambda m: m.update(version=0), "version"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_strangers_manifest_is_refused(copied: Path, what: str) -> None:
    alter, told = HOSTILE[what]
    read = plain(copied)
    alter(read)
    put(copied, read)
    with pytest.raises(DamagedError) as error:
        checkpoint.open(copied)
    assert told in str(error.value)
    assert str(copied / "manifest.json") in str(error.value)
    assert str(error.value).isprintable()


def test_a_newer_format_is_no_damage(copied: Path) -> None:
    put(copied, plain(copied) | {"version": 2, "more": 1})
    with pytest.raises(CheckpointError, match="update hpcsync") as error:
        checkpoint.open(copied)
    assert not isinstance(error.value, DamagedError)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1, "a": 2,\n',
        b'{"a": NaN,\n',
        b'{"a": ' + b"9" * 10_000 + b",\n",
        b'{"a": "\xff",\n',
        b"[1,\n",
    ],
)
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    for data in (text, text + f'"checksum": "{manifests.digest(text)}"\n}}\n'.encode()):
        with pytest.raises(DamagedError, match=r"^manifest\.json: "):
            parsing.parse(data)


def test_a_bool_is_true_or_false(copied: Path) -> None:
    read = plain(copied)
    found = piece(read, "model/mask")
    data = bytearray((copied / found["file"]).read_bytes())
    data[found["offset"]] = 7
    found["xxh3"] = manifests.digest(bytes(data[found["offset"] :][: found["nbytes"]]))
    (copied / found["file"]).write_bytes(data)
    put(copied, read)
    with checkpoint.open(copied) as opened, pytest.raises(DamagedError, match="neither true nor"):
        opened.common()


def test_no_memory_is_taken_for_what_is_not_there(copied: Path) -> None:
    read = plain(copied)
    for each in read["files"]:
        each["size"] = 1 << 50
    tensor(read).update(
        shape=[1 << 40, 7],
        pieces=[dict(piece(read), start=0, rows=1 << 40, nbytes=28 << 40, offset=1 << 40)],
    )
    put(copied, read)
    with pytest.raises(DamagedError, match="bytes instead of"):
        checkpoint.open(copied)


def values(read: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values of a JSON tree."""
    items = (
        list(read.items())
        if isinstance(read, dict)
        else list(enumerate(read))
        if isinstance(read, list)
        else []
    )
    return [path, *(each for key, item in items for each in values(item, (*path, key)))]


def test_whatever_a_manifest_says_is_read_right_or_refused(copied: Path) -> None:
    """Any value in it replaced by any other: no other error, and no other bytes than stored."""
    draw = random.Random(2)
    whole = plain(copied)
    ways = values(whole)[1:]
    others: list[Any] = [0, 1, -1, 7, 1 << 31, 1 << 62, 1 << 70, 0.5, "", "x", None, True, [], {}]
    others += [[1], {"a": 1}, {"$tensor": "model/mask"}, {"$array": "model/blocks.0.bias"}, 1e300]
    for _ in range(CASES):
        read = copy.deepcopy(whole)
        *way, last = draw.choice(ways)
        at = read
        for key in way:
            at = at[key]
        at[last] = draw.choice(others)
        put(copied, read)
        with contextlib.suppress(CheckpointError), checkpoint.open(copied) as found:
            found.verify()
            found.common()
            found.own(0)


def test_units_are_every_byte_once(made: Path) -> None:
    with checkpoint.open(made) as found:
        units = found.units()
        for unit in units:
            found.check(unit)
        assert sum(unit.nbytes for unit in units) == found.manifest.nbytes
        for name, entry in found.manifest.tensors.items():
            for stored in entry.pieces:
                out = np.empty(stored.nbytes, np.uint8)
                found.read(name, stored, out)
                whole = (made / stored.file).read_bytes()
                assert out.tobytes() == whole[stored.offset :][: stored.nbytes]
