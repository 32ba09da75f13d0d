"""What a schedule is: a collective algorithm written down as data.

A schedule is what one rank does in one collective: a list of steps over a buffer that is cut
into `chunks` parts (see `chunk_bounds`). It is a pure function of (kind, rank, size), so the
list that runs over a transport is the list that `verify` proved and `cost` priced.

A step
  1. posts all its sends and receives at once, in the order of the tuples; between two ranks
     messages match in the order in which they were posted;
  2. sends the values from before the step;
  3. REDUCE: every received chunk becomes the sum, in ascending rank order, of the rank's own
     value (at its own place in that order) and the received ones. Received values wait in
     scratch memory, and a chunk that is also being sent is only overwritten once that send is
     complete. COPY: received chunks are stored; they never overlap a chunk that the step sends,
     so a transport may receive in place;
  4. ends when its sends and receives are complete.

`recvs` are in ascending order of peer, and any two of a step name the same chunks or none in
common, so that chunks are added range by range.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a collective leaves behind."""

    ALLREDUCE = "allreduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALLGATHER = "allgather"


class Action(Enum):
    """What a step does with what it receives."""

    REDUCE = "reduce"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message: chunks [lo, hi) to or from a peer (a rank of the schedule's group)."""

    peer: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class Step:
    """Transfers that are posted together; the module docstring says what a step means."""

    sends: tuple[Transfer, ...]
    recvs: tuple[Transfer, ...]
    action: Action


@dataclass(frozen=True, slots=True)
class Schedule:
    """One rank's part in a collective over `size` ranks.

    `owned` is the chunk range that this rank has complete after REDUCE_SCATTER, or brings to
    ALLGATHER; (0, 0) if none. After ALLREDUCE every rank has every chunk: (0, chunks).
    """

    name: str
    kind: Kind
    rank: int
    size: int
    chunks: int
    steps: tuple[Step, ...]
    owned: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fold:
    """Any rank count seen as a power of two: `power` core ranks and `extra` folded ones.

    The first 2 * extra ranks form neighbouring pairs. The even one is core and stands for both;
    the odd one hands it its values before the collective and gets the result after it (Thakur,
    Rabenseifner and Gropp, IJHPCA 19(1), 2005, section 4.5).
    """

    power: int
    extra: int

    @classmethod
    def of(cls, size: int) -> Fold:
        """The fold of `size` >= 1 ranks onto the largest power of two that fits."""
        power = 1 << (size.bit_length() - 1)
        return cls(power, size - power)

    def core(self, rank: int) -> int | None:
        """Index of `rank` among the core ranks; None if it is folded into rank - 1."""
        if rank >= 2 * self.extra:
            return rank - self.extra
        return None if rank % 2 else rank // 2

    def rank(self, core: int) -> int:
        """The rank that is core index `core`."""
        return 2 * core if core < self.extra else core + self.extra

    def partner(self, rank: int) -> int | None:
        """The folded rank that core `rank` stands for; None if it stands for itself only."""
        return rank + 1 if rank < 2 * self.extra else None


def check_group(rank: int, size: int) -> None:
    """Raise ValueError unless 0 <= rank < size."""
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in a group of {size} ranks")


def trivial(name: str, kind: Kind) -> Schedule:
    """The schedule of a group of one rank: nothing to do, one chunk, owned."""
    return Schedule(name, kind, 0, 1, 1, (), (0, 1))


def chunk_bounds(n: int, chunks: int, align: int = 16) -> list[int]:
    """Element offsets that cut a buffer of `n` elements into `chunks` parts: chunk i is
    [bounds[i], bounds[i + 1]).

    All bounds are multiples of `align` elements or n itself; parts differ by at most one block
    of `align`, so some are empty when there are fewer blocks than chunks. Raises ValueError.
    """
    if n < 0 or chunks < 1 or align < 1:
        raise ValueError(f"cannot cut {n} elements into {chunks} chunks aligned to {align}")
    blocks = -(-n // align)
    return [min(n, blocks * i // chunks * align) for i in range(chunks + 1)]
