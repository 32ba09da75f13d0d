"""What bench_codecs times on a GPU: the kernels of hpcsync.device.cuda_kernels.

The bytes that each operation touches are counted as in codec_work. Work is timed by events on the
stream, and the copy beside it is the driver's, from device memory to device memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcsync import codecs
from hpcsync.codecs import Moment, PieceCodec
from tools.benchmark import BenchmarkError
from tools.codec_work import LINE, SETTINGS, SUMS, Operation, normal

CODECS = ("bf16", "fp16", "fp8", "int8", "int4", "onebit", "topk")
SEED = 1


@dataclass(frozen=True)
class Memory:
    """Memory that kernels can reach.

    Attributes:
        put: a copy of a host array there.
        address: of what ``put`` gave.
    """

    put: Callable[[Any], Any]
    address: Callable[[Any], int]


class Piece:
    """One codec's arrays on the device, and its kernels called on them."""

    def __init__(self, name: str, count: int, kernels: Any, memory: Memory) -> None:
        codec = codecs.build(name, SETTINGS, native=False)
        assert isinstance(codec, PieceCodec), f"{name} is coded in rounds"
        self.codec, self.count, self.kernels, self.memory = codec, count, kernels, memory
        values = normal(count)
        coded = np.zeros(codec.capacity(count), np.uint8)
        codec.encode(values, coded, None, Moment())
        self.raw, self.used = values.nbytes, coded.nbytes
        self.values, self.own = memory.put(values), memory.put(normal(count, 3))
        self.out, self.coded, self.decoded = map(memory.put, (coded, coded, values))
        store = codec.store(count, "sender")
        assert store is not None
        self.kept = store.nbytes
        self.store = {key: memory.put(array) for key, array in store.arrays.items()}

    def _store(self) -> tuple[Any, ...]:
        """The arguments that say where errors are held."""
        held = [self.memory.address(array) for array in self.store.values()]
        return (*held, getattr(self.codec, "keep", 0.0)) if self.codec.name == "int4" else (*held,)

    def encode(self) -> None:
        """With error feedback."""
        at, name = self.memory.address, self.codec.name
        x, out, drawn = at(self.values), at(self.out), (False, SEED)
        if name == "onebit":
            self.kernels.onebit_encode(x, *self._store(), self.count, out)
        elif name == "int4":
            self.kernels.int4_encode(x, *self._store(), self.count, *drawn, out)
        else:
            self.kernels.encode(name, x, *self._store(), self.count, *drawn, out)

    def decode(self) -> None:
        at = self.memory.address
        self.kernels.decode(self.codec.name, at(self.coded), self.count, at(self.decoded))

    def decode_add(self) -> None:
        at = self.memory.address
        self.kernels.decode_add(self.codec.name, at(self.coded), self.count, at(self.decoded))

    def combine(self) -> None:
        """With one other rank's piece."""
        at, name = self.memory.address, self.codec.name
        sources = (at(self.own), 0, [at(self.coded)], self.count, 2.0, *self._store())
        drawn = (False, SEED, at(self.out))
        if name == "onebit":
            self.kernels.onebit_combine(*sources, at(self.out))
        elif name == "int4":
            self.kernels.int4_combine(*sources, *drawn)
        else:
            self.kernels.combine(name, *sources, *drawn)

    def operations(self) -> list[Operation]:
        """All of them, with the bytes that they touch."""
        raw, used, kept = self.raw, self.used, self.kept
        touched = {
            "encode": raw + used + 2 * kept,
            "decode": used + raw,
            "decode_add": used + 2 * raw,
            "combine": 2 * raw + 2 * used + 2 * kept,
        }
        name = self.codec.name
        return [
            Operation(codec=name, name=key, touched=nbytes, source=raw, run=getattr(self, key))
            for key, nbytes in touched.items()
        ]


class TopK:
    """topk's arrays on the device, and its kernels called on them."""

    def __init__(self, count: int, kernels: Any, memory: Memory) -> None:
        from hpcsync.device import cuda_sparse

        codec = codecs.build("topk", SETTINGS, native=False)
        assert isinstance(codec, PieceCodec)
        values, coded = normal(count), np.zeros(codec.capacity(count), np.uint8)
        self.count, self.raw, self.at = count, values.nbytes, memory.address
        self.k = max(1, round(SETTINGS.ratio * count))
        self.used = codec.encode(values, coded, codec.store(count, "sender"), Moment(seed=SEED))
        self.sparse = cuda_sparse.CudaSparse(kernels.launcher)
        words = cuda_sparse.encode_scratch(count)
        self.values, self.decoded = memory.put(values), memory.put(np.zeros_like(values))
        self.coded, self.out = memory.put(coded), memory.put(coded)
        self.error = memory.put(np.zeros_like(values))
        self.scratch = memory.put(np.zeros(words, np.uint32))
        self.said = memory.put(np.zeros(1, np.uint64))

    def encode(self) -> None:
        """With error feedback, without momentum."""
        at = self.at
        stores = (None, at(self.error))
        outputs = (at(self.scratch), at(self.out), at(self.said))
        self.sparse.encode(
            at(self.values), 1.0, 0.0, *stores, self.count, self.k, 0.0, SEED, *outputs
        )

    def decode(self) -> None:
        at = self.at
        self.sparse.decode(at(self.coded), self.count, at(self.scratch), at(self.decoded))

    def decode_add(self) -> None:
        at = self.at
        self.sparse.decode_add(at(self.coded), self.count, at(self.scratch), at(self.decoded))

    def operations(self) -> list[Operation]:
        """All of them, with the bytes that they touch."""
        # Of what is added to, a cache line an element that was sent.
        added = min(self.raw, LINE * self.k)
        touched = {
            "encode": 3 * self.raw + self.used,
            "decode": self.used + self.raw,
            "decode_add": self.used + 2 * added,
        }
        return [
            Operation(codec="topk", name=key, touched=n, source=self.raw, run=getattr(self, key))
            for key, n in touched.items()
        ]


def sums(count: int, kernels: Any, memory: Memory) -> list[Operation]:
    """The mean of some buffers, written to one of them or to all."""
    found = []
    for sources, outs in SUMS:
        held = [memory.put(normal(count, seed)) for seed in range(sources)]
        places = [memory.address(each) for each in held]

        def run(held: list[Any] = held, places: list[int] = places, outs: int = outs) -> None:
            assert held  # they live as long as this
            kernels.add("f32", places[:outs], places, count, float(len(places)))

        raw = 4 * count
        found.append(
            Operation(
                codec="sum",
                name=f"{sources} -> {outs}",
                touched=(sources + outs) * raw,
                source=sources * raw,
                run=run,
            )
        )
    return found


def pieces(name: str, count: int, kernels: Any, memory: Memory) -> list[Operation]:
    """The operations of a codec."""
    if name == "topk":
        return TopK(count, kernels, memory).operations()
    return Piece(name, count, kernels, memory).operations()


# -- CuPy --------------------------------------------------------------------------------


class Gpu:
    """The first GPU: its memory, its kernels and its clock."""

    def __init__(self) -> None:
        """Raises BenchmarkError: there is none."""
        try:
            import cupy

            count = cupy.cuda.runtime.getDeviceCount()
        except ImportError:
            raise BenchmarkError(
                "--device gpu: CuPy is missing (pip install hpcsync[cuda12]); nothing was measured"
            ) from None
        except Exception as error:  # CuPy's own kinds, which need it to be named
            count, reason = 0, str(error).splitlines()[0]
        else:
            reason = "the driver names no device"
        if not count:
            raise BenchmarkError(
                f"--device gpu: no GPU is at hand ({reason}); nothing was measured"
            )

        from hpcsync.device import cuda_launch, cuda_modules

        self._cupy = cupy
        self.kernels = cuda_modules.load(0)
        self.memory = Memory(cupy.asarray, cuda_launch.address_of)
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        driver = cupy.cuda.runtime.driverGetVersion()
        cuda = f"CUDA {driver // 1000}.{driver % 1000 // 10}"
        self.name = f"{properties['name'].decode()}, {cuda}, CuPy {cupy.__version__}"

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Of a call, by the stream's own clock, on average over some."""
        start, stop = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, stop)) / 1e3 / calls

    def copier(self, most: int) -> Callable[[int], None]:
        """A copy of any size up to ``most`` bytes."""
        # Not CuPy's ``ones``, a kernel of its own, which needs CUDA's headers to be compiled.
        source, target = (self._cupy.empty(most, "uint8") for _ in range(2))
        for each in (source, target):
            each.data.memset(1, most)

        def copy(nbytes: int) -> None:
            target.data.copy_from_device_async(
                source.data, nbytes, self._cupy.cuda.get_current_stream()
            )

        return copy

    def operations(self, name: str, count: int) -> list[Operation]:
        """Of a codec, or of ``sum``."""
        if name == "sum":
            return sums(count, self.kernels, self.memory)
        return pieces(name, count, self.kernels, self.memory)
