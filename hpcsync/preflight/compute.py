"""What a rank computes and moves: a matrix product and a copy, on the device that it would use.

A rate is the best of several windows, of as many as it takes until the two best are near each
other. Each window is longer than the period by which a quota of processor time is given out, so
that a quota shows in all of them; what the system did for somebody else shows in some.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .wire import wants_more

_WINDOW_S = 0.2
_WARM = 2  # calls that do not count


@dataclass(frozen=True, slots=True)
class Size:
    """Of the work: rows of the square matrices, bytes of the array that is copied.

    Each call takes milliseconds, and an array does not fit into a cache.
    """

    rows: int
    nbytes: int


_SIZES = {"cpu": Size(768, 64 << 20), "cuda": Size(8192, 1 << 30)}


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one rank.

    Attributes:
        product: float32 operations a second of a matrix product.
        memory: bytes a second that a copy reads and writes.
        wrong: products that were not the same bits as the first, or as other ranks'.
        device: what computed.
        checksum: of the first product; ranks of a kind multiply the same matrices.
    """

    product: float
    memory: float
    wrong: int
    device: str
    checksum: int = 0

    @property
    def kind(self) -> str:
        """Of the device: cpu or cuda."""
        return self.device.partition(":")[0]

    def better(self, other: Rates) -> Rates:
        """The best of two measurements of a rank."""
        return Rates(
            max(self.product, other.product),
            max(self.memory, other.memory),
            self.wrong + other.wrong + (self.checksum != other.checksum),
            self.device,
            self.checksum,
        )


def device_of(local_rank: int) -> torch.device:
    """A GPU of the node, by the rank's place on it; the processor where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


class Bench:
    """The work of one rank; holds its memory."""

    def __init__(self, device: torch.device, size: Size | None = None) -> None:
        self._device = device
        self._synchronize: Callable[[], None] = torch.get_device_module(device).synchronize
        size = size or _SIZES[device.type]
        # Small whole numbers: whatever the order of additions, the product is exact.
        values = torch.arange(size.rows * size.rows, dtype=torch.float32, device=device)
        self._left = (values % 7).reshape(size.rows, size.rows)
        self._right = (values % 5).reshape(size.rows, size.rows)
        self._product = self._left @ self._right
        self._first = self._product.clone()
        self._source = torch.ones(size.nbytes // 4, device=device)
        self._target = torch.zeros_like(self._source)
        self._operations = 2.0 * size.rows**3
        self._moved = 2.0 * size.nbytes

    def measure(self, window_s: float | None = None, agree: Callable[[bool], bool] = bool) -> Rates:
        """The best of several windows of either kind, in turns.

        Args:
            agree: whether another window is measured, from whether this rank wants one: ranks that
                share a memory would find more of it once the others have stopped.
        """
        window_s = window_s or _WINDOW_S
        products: list[float] = []
        memories: list[float] = []
        wrong = 0
        while agree(wants_more(products) or wants_more(memories)):
            products.append(self._calls_a_second(self._multiply, window_s))
            wrong += not torch.equal(self._product, self._first)
            memories.append(self._calls_a_second(self._copy, window_s))
        return Rates(
            self._operations * max(products),
            self._moved * max(memories),
            wrong,
            str(self._device),
            zlib.crc32(self._first.cpu().numpy().data),
        )

    def _multiply(self) -> None:
        torch.matmul(self._left, self._right, out=self._product)

    def _copy(self) -> None:
        self._target.copy_(self._source)

    def _calls_a_second(self, work: Callable[[], None], window_s: float) -> float:
        for _ in range(_WARM):
            work()
        self._synchronize()
        began, calls, taken = time.perf_counter(), 0, 0.0
        while taken < window_s:
            work()
            self._synchronize()
            calls += 1
            taken = time.perf_counter() - began
        return calls / taken
