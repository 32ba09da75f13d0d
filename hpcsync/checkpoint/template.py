"""The HDF5 structure of files, made by h5py once and then written as bytes.

h5py and HDF5 take a lock that all threads of a process share, so neither is used to write data: a
slow disk would hold up the trace's writer. A template has the bytes of a file outside its datasets,
and where each dataset begins; the datasets are contiguous, so their bytes are the tensors'.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np

from .layout import STORED_AS, Dataset, TensorMeta
from .manifest import FORMAT, VERSION

README = """\
Tensors of a checkpoint of hpcsync, each under its name. They are virtual datasets: the data lie in
the files rank-*.h5 or node-*.h5 beside this one, and HDF5 reads missing files as zeros, so compare
with manifest.json, which has the size and the checksum of every file and dataset (XXH3-128), and
all that is no tensor. Where a dataset has the attribute torch_dtype, its integers are the bits of
that type: uint16 of bfloat16, for example.
"""
_BLOCK = 4096
# Larger datasets begin on a page.
_ALIGN_FROM, _ALIGN_TO = 1 << 16, 4096


class Template(NamedTuple):
    """A file without the bytes of its datasets.

    Attributes:
        offsets: where each dataset begins; those without elements are not there.
        rest: (offset, bytes) of all that is outside the datasets, ascending.
    """

    size: int
    offsets: dict[str, int]
    rest: tuple[tuple[int, bytes], ...]


class Source(NamedTuple):
    """A dataset in a file beside the index."""

    file: str
    dataset: Dataset


def make(datasets: Sequence[Dataset]) -> Template:
    """The template of a file that holds these, all of which have elements."""
    memory = _Memory()
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets: dict[str, int] = {}
    with _file(memory, alignment_threshold=_ALIGN_FROM, alignment_interval=_ALIGN_TO) as file:
        for each in datasets:
            made = _dataset(file, each.meta, each.shape, create)
            offsets[each.name] = int(made.get_offset())
    spans = sorted((offsets[each.name], each.nbytes) for each in datasets)
    rest, at = [], 0
    for offset, nbytes in [*spans, (memory.size, 0)]:
        if at < offset:
            rest.append((at, memory.read_at(at, offset - at)))
        at = offset + nbytes
    return Template(memory.size, offsets, tuple(rest))


@functools.lru_cache(maxsize=2)
def index(tensors: tuple[tuple[TensorMeta, tuple[Source, ...]], ...]) -> bytes:
    """The bytes of index.h5: each tensor whole, made of datasets of the files beside it."""
    memory = _Memory()
    with _file(memory) as file:
        file.attrs["README"] = README
        for meta, sources in tensors:
            create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            space = _space(meta.shape)
            for file_name, dataset in sources:
                start = [0] * len(meta.shape)
                if meta.shape:
                    start[meta.axis] = dataset.start
                    space.select_hyperslab(tuple(start), dataset.shape)
                name = dataset.name.replace("%", "%%").encode()  # HDF5 numbers sources by %b
                create.set_virtual(space, file_name.encode(), name, _space(dataset.shape))
            _dataset(file, meta, meta.shape, create)
    return memory.read_at(0, memory.size)


def _file(memory: _Memory, **options: int) -> h5py.File:
    # Readers of HDF5 1.10 and later open what these bounds give.
    file = h5py.File(memory, "w", libver=("earliest", "v110"), **options)
    file.attrs["format"] = FORMAT
    file.attrs["version"] = VERSION
    return file


def _dataset(file: h5py.File, meta: TensorMeta, shape: tuple[int, ...], create: Any) -> Any:
    """A new dataset, made by the low-level calls: there may be many thousands."""
    kind = h5py.h5t.py_create(np.dtype(STORED_AS.get(meta.dtype, meta.dtype)), logical=True)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    name = meta.name.encode()
    made = h5py.h5d.create(file.id, name, kind, _space(shape), dcpl=create, lcpl=links)
    if meta.dtype in STORED_AS:
        h5py.Dataset(made).attrs["torch_dtype"] = meta.dtype
    return made


def _space(shape: tuple[int, ...]) -> Any:
    if not shape:
        return h5py.h5s.create(h5py.h5s.SCALAR)
    return h5py.h5s.create_simple(shape)


class _Memory(io.RawIOBase):
    """A file in memory that keeps only what was written to it, in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, bytearray] = {}
        self._at = 0
        self.size = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        total = len(left)
        while left:
            number, at = divmod(self._at, _BLOCK)
            part = left[: _BLOCK - at]
            block = self._blocks.setdefault(number, bytearray(_BLOCK))
            block[at : at + len(part)] = part
            left = left[len(part) :]
            self._at += len(part)
        self.size = max(self.size, self._at)
        return total

    def readinto(self, data: Any) -> int:
        target = memoryview(data).cast("B")
        target[:] = self.read_at(self._at, len(target))
        self._at += len(target)
        return len(target)

    def read_at(self, at: int, nbytes: int) -> bytes:
        """Bytes from ``at`` on; zeros where nothing was written."""
        first, last = at // _BLOCK, (at + nbytes - 1) // _BLOCK
        empty = bytes(_BLOCK)
        whole = b"".join(self._blocks.get(number, empty) for number in range(first, last + 1))
        return whole[at - first * _BLOCK :][:nbytes]
