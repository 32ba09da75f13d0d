"""Checkpoints as files: what is written is read, by hpcsync, by h5py and by HDF5's own tools."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcsync import checkpoint
from hpcsync.checkpoint import folder, layout, state, writer
from hpcsync.checkpoint.layout import Dataset, Piece, TensorMeta
from hpcsync.checkpoint.snapshot import HostBuffer
from hpcsync.errors import CheckpointError
from tests.checkpoints import example, make, same

SHAPES = [(), (1,), (0,), (4, 0, 2), (1, 1, 9), (7, 5), (33,), (1, 2, 3, 4)]


def every_dtype(seed: int = 0) -> dict[str, torch.Tensor]:
    """A tensor of every dtype and shape, of random bits where any are valid."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, size in layout.SIZES.items():
        for shape in SHAPES:
            count = math.prod(shape)
            top = 2 if name == "bool" else 256
            bits = torch.randint(top, (count * size,), dtype=torch.uint8, generator=random)
            found[f"{name}-{shape}"] = bits.view(state.torch_dtype(name)).reshape(shape)
    return found


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_dtype_and_shape_comes_back_at_every_rank_count(tmp_path: Path, ranks: int) -> None:
    common = {"model": every_dtype(), "step": 5}
    own = [{"mine": every_dtype(rank), "rank": rank} for rank in range(ranks)]
    made = make(tmp_path, 7, common, own)
    with checkpoint.open(made) as found:
        assert found.verify() == []
        assert same(found.common(), common)
        assert all(same(found.own(rank), own[rank]) for rank in range(ranks))
        assert (found.manifest.step, found.manifest.ranks) == (7, ranks)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(max_size=6), st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=9
    ),
    st.integers(1, 8),
    st.data(),
)
def test_any_names_and_shapes_come_back(
    tmp_path: Path, shapes: dict[str, list[int]], ranks: int, data: st.DataObject
) -> None:
    common = {"model": {name: torch.randn(shape) for name, shape in shapes.items()}}
    own = [{"r": {name: torch.randn(shape)}} for name, shape in [*shapes.items()] * ranks][:ranks]
    flat = state.flatten(common)
    first = data.draw(st.sets(st.sampled_from(list(flat.tensors))))
    target = tmp_path / "checkpoints"
    shutil.rmtree(target, ignore_errors=True)
    made = make(target, 1, common, own, first_only=first)
    with checkpoint.open(made) as found, h5py.File(made / "index.h5") as index:
        assert found.verify() == []
        assert same(found.common(), common)
        for name, tensor in flat.tensors.items():
            assert np.array_equal(index[name][()], tensor.numpy())


@pytest.mark.parametrize("nodes", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]]])
def test_a_file_a_node_written_by_its_ranks(tmp_path: Path, nodes: list[list[int]]) -> None:
    common, own = example(ranks=4)
    made = make(tmp_path, 100, common, own, nodes=nodes)
    names = [f"node-{node:05d}.h5" for node in range(len(nodes))]
    assert sorted(each.name for each in made.iterdir()) == ["index.h5", "manifest.json", *names]
    with checkpoint.open(made) as found, h5py.File(made / "index.h5") as index:
        assert found.verify() == []
        assert same(found.common(), common)
        assert all(same(found.own(rank), own[rank]) for rank in range(4))
        weight = common["model"]["embed.weight"]
        assert np.array_equal(index["model/embed.weight"][...], weight.numpy())
        assert found.manifest.nodes == tuple(map(tuple, nodes))


def test_each_byte_of_each_file_is_under_one_checksum(tmp_path: Path) -> None:
    common, own = example(ranks=3)
    made = make(tmp_path, 100, common, own)
    manifest = json.loads((made / "manifest.json").read_text())
    pieces = [piece for each in manifest["tensors"] for piece in each["pieces"]]
    for file in manifest["files"]:
        data = (made / file["name"]).read_bytes()
        assert len(data) == file["size"]
        rest, at = b"", 0
        for piece in sorted(pieces, key=lambda each: each["offset"]):
            if piece["file"] != file["name"]:
                continue
            start, stop = piece["offset"], piece["offset"] + piece["nbytes"]
            assert xxhash.xxh3_128_hexdigest(data[start:stop]) == piece["xxh3"]
            rest, at = rest + data[at:start], stop
        assert xxhash.xxh3_128_hexdigest(rest + data[at:]) == file["rest"]
    text = (made / "manifest.json").read_bytes()
    head, found = re.fullmatch(rb'(.*\n)"checksum": "(.{32})"\n}\n', text, re.DOTALL).groups()
    assert xxhash.xxh3_128_hexdigest(head) == found.decode()


def test_parts_of_a_checkpoint_can_be_read_alone(tmp_path: Path) -> None:
    common, own = example()
    with checkpoint.open(make(tmp_path, 100, common, own)) as found:
        assert same(
            found.common("model", "sampler", "absent"),
            {"model": common["model"], "sampler": common["sampler"]},
        )
        assert same(found.tensor("model/norm.count"), common["model"]["norm.count"])
        with pytest.raises(CheckpointError, match="no tensor model/absent"):
            found.tensor("model/absent")


def test_h5py_alone_reads_tensors_by_name(tmp_path: Path) -> None:
    common, own = example(ranks=3)
    made = make(tmp_path, 100, common, own)
    moved = made.rename(tmp_path / "elsewhere")
    with h5py.File(moved / "index.h5") as index:
        assert "bfloat16" in index.attrs["README"]
        flat = state.flatten(common).tensors
        for name, tensor in flat.items():
            found = index[name]
            assert found.shape == tuple(tensor.shape)
            if found.attrs.get("torch_dtype") == "bfloat16":
                back = torch.from_numpy(found[...]).view(torch.bfloat16)
                assert torch.equal(back, tensor)
            else:
                assert np.array_equal(found[()], tensor.numpy())
        assert np.array_equal(index["ranks/1/numpy"][...], own[1]["numpy"])
    with h5py.File(moved / "rank-00001.h5") as file:
        assert file["ranks/1/torch"].chunks is None
        assert file.attrs["format"] == "hpcsync-checkpoint"


@pytest.mark.parametrize("tool", ["h5ls", "h5dump"])
def test_hdf5_tools_read_tensors_by_name(tmp_path: Path, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} missing: apt-get install hdf5-tools")
    common = {"model": {"w": torch.arange(12).reshape(4, 3), "count": torch.tensor(77)}}
    made = make(tmp_path, 100, common, [{}, {}])
    index = str(made / "index.h5")
    # From another folder: the files are found beside the index.
    words = [tool, "-d", "/model/w", "-d", "/model/count", index]
    if tool == "h5ls":
        words = [tool, "-r", "-d", index]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"\d+", re.sub(r"\(\d+(,\d+)*\)", "", done.stdout))
    assert "77" in numbers
    assert re.search(r"9,\s*10,\s*11", done.stdout)


def test_a_writer_goes_on_with_other_shapes(tmp_path: Path) -> None:
    write = writer.PartWriter("rank-00000.h5")
    buffer = HostBuffer()
    for shape in [(4, 4), (4, 4), (300, 7), (2,)]:
        tensors = {"a/w": torch.randn(shape)}
        metas = state.metas(tensors)
        pieces = [layout.whole(meta) for meta in metas]
        part = write.write(tmp_path, layout.datasets(metas, pieces), buffer.fill(tensors, pieces))
        assert (tmp_path / "rank-00000.h5").stat().st_size == part.size
        with h5py.File(tmp_path / "rank-00000.h5") as file:
            assert np.array_equal(file["a/w"][...], tensors["a/w"].numpy())


def test_large_datasets_begin_on_a_page(tmp_path: Path) -> None:
    tensors = {"small": torch.ones(3), "large": torch.ones(1 << 16), "more": torch.ones(1 << 16)}
    metas = state.metas(tensors)
    pieces = [layout.whole(meta) for meta in metas]
    filled = HostBuffer().fill(tensors, pieces)
    part = writer.PartWriter("rank-00000.h5").write(
        tmp_path, layout.datasets(metas, pieces), filled
    )
    offsets = {name: piece.offset for name, piece in part.pieces}
    assert offsets["large"] % 4096 == offsets["more"] % 4096 == 0


def test_a_snapshot_is_of_its_time_and_reuses_memory() -> None:
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(5)}
    tensors["c"] = torch.arange(8.0).reshape(1, 4, 2).transpose(1, 2)  # not contiguous
    pieces = [Piece("a", 1, 2, 32), Piece("b", 0, 1, 8), Piece("c", 1, 1, 16)]
    buffer = HostBuffer()
    buffer.reserve(pieces)
    size = buffer.nbytes
    first = buffer.fill(tensors, pieces)
    tensors["a"] += 1
    assert [each.data.nbytes for each in first] == [32, 8, 16]
    assert first[0].data.view(np.float32).tolist() == list(range(4, 12))
    assert first[1].data.view(np.int64).tolist() == [5]
    assert first[2].data.view(np.float32).tolist() == [1, 3, 5, 7]
    where = first[0].data.ctypes.data
    second = buffer.fill(tensors, pieces)
    assert second[0].data.ctypes.data == where
    assert buffer.nbytes == size


def test_errors_of_the_disk_come_as_they_are(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1 << 16)}
    metas = state.metas(tensors)
    pieces = [layout.whole(meta) for meta in metas]
    filled = HostBuffer().fill(tensors, pieces)
    datasets = layout.datasets(metas, pieces)
    write = writer.PartWriter("rank-00000.h5")
    with pytest.raises(FileNotFoundError):
        write.write(tmp_path / "gone", datasets, filled)
    (tmp_path / "rank-00000.h5").symlink_to("elsewhere.h5")
    with pytest.raises(OSError, match="symbolic"):
        write.write(tmp_path, datasets, filled)
    assert not (tmp_path / "elsewhere.h5").exists()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 100_000

    def pwrite(_: int, data: Any, offset: int) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(28, "No space left on device")
        done = min(len(data), 4097, room)
        room -= done
        return done

    tensors = {"a": torch.ones(1 << 16)}
    pieces = [layout.whole(meta) for meta in state.metas(tensors)]
    filled = HostBuffer().fill(tensors, pieces)
    datasets = layout.datasets(state.metas(tensors), pieces)
    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        writer.PartWriter("rank-00000.h5").write(tmp_path, datasets, filled)


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite

    def pwrite(handle: int, data: Any, offset: int) -> int:
        return whole(handle, data[:1000], offset)

    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    common, own = example()
    with checkpoint.open(make(tmp_path, 100, common, own)) as found:
        assert found.verify() == []


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    common = {"ranks": {"0": {"x": torch.ones(1)}}}
    with pytest.raises(CheckpointError, match="same name"):
        make(tmp_path, 100, common, [{"x": torch.ones(2)}])


def test_an_unpublished_checkpoint_is_never_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the last call before a kill was, what is found afterwards is whole."""
    make(tmp_path, 100, *example(seed=1))
    calls = 0
    for last in range(1, 100):
        calls = last
        if _killed_after(tmp_path, last, monkeypatch):
            break
        found = checkpoint.reader.find(tmp_path)
        assert [folder.step_of(each.name) for each in found] in ([100], [200, 100])
        for each in found:
            assert checkpoint.open(each).verify() == []
        shutil.rmtree(tmp_path / "step-00000200", ignore_errors=True)
        folder.clean(tmp_path)
        assert folder.latest(tmp_path) in ("step-00000100", "step-00000200")
    assert calls > 10


@pytest.mark.parametrize("fault", ["absent", "short", "link", "folder"])
def test_without_all_parts_nothing_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """As where each node has a disk of its own under the same name."""
    check = writer._check_present

    def loses(fresh: Path, parts: Any) -> None:
        path = fresh / "rank-00001.h5"
        if fault == "absent":
            path.unlink()
        elif fault == "short":
            os.truncate(path, path.stat().st_size - 1)
        elif fault == "link":
            path.rename(fresh / "other")
            path.symlink_to("other")
        else:
            shutil.rmtree(fresh)
        check(fresh, parts)

    monkeypatch.setattr(writer, "_check_present", loses)
    with pytest.raises(CheckpointError, match=r"h5: is not there .* that all nodes share"):
        make(tmp_path, 100, *example())
    assert folder.steps(tmp_path) == []


class _Killed(BaseException):
    pass


def _killed_after(target: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Write step 200 and stop before the call of the system number ``count``; True if it ended."""
    left = count

    def counted(call: Any) -> Any:
        def inner(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                raise _Killed
            return call(*args, **options)

        return inner

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace", "ftruncate"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            make(target, 200, *example(seed=2))
        except _Killed:
            return False
    return True


def test_datasets_of_one_tensor_adjoin() -> None:
    meta = TensorMeta("w", "float32", (10, 2))
    pieces = [Piece("w", 4, 2, 16), Piece("w", 2, 2, 16)]
    assert layout.datasets([meta], pieces) == (Dataset(meta, 2, 4),)
