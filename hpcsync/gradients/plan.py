"""Which gradients travel together: pure, from sizes and an order.

Parameters are put into buckets in the order in which their gradients become ready; a bucket
holds one dtype and is closed when it reaches its size. The first one is small, so that the
network starts early (Li et al., PyTorch Distributed, VLDB 2020, section 3.2.3).

    bucket   | coded param | coded param | ... | param | param | ... | used |
               without gaps, which would be coded too          one element a parameter:
                                                               whether this rank used it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_FEWEST_BUCKETS = 8
# Of coded gradients: their time on the wire is short, and each bucket costs processor time.
_FEWEST_CODED = 4
_ALIGN = 64  # bytes; a parameter's gradient starts on a cache line


@dataclass(frozen=True)
class Parameter:
    """What the plan has to know of a parameter.

    Attributes:
        dtype: as torch names it, without the ``torch.``.
        itemsize: bytes an element.
        coded: whether a codec serves it.
    """

    name: str
    numel: int
    dtype: str
    itemsize: int
    shape: tuple[int, ...] = ()
    coded: bool = False


@dataclass(frozen=True)
class BucketPlan:
    """One bucket: which parameters, and where each stands.

    Attributes:
        params: indices into the list that was planned; those that are coded first.
        offsets: first element of each parameter.
        coded_numel: elements from the first on that are coded.
        used_offset: first of the elements that say which parameters were used.
        numel: elements in all.
    """

    index: int
    dtype: str
    itemsize: int
    params: tuple[int, ...]
    offsets: tuple[int, ...]
    used_offset: int
    numel: int
    coded_numel: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def plan_buckets(
    params: Sequence[Parameter], order: Sequence[int], cap_bytes: int, first_bytes: int
) -> tuple[BucketPlan, ...]:
    """Buckets in the order in which they become complete.

    Args:
        params: all parameters.
        order: indices of ``params``, each once, first ready first.
        cap_bytes: a bucket is closed when it holds at least this much. A small model gets smaller
            buckets, about ``_FEWEST_BUCKETS`` or ``_FEWEST_CODED``, or nothing would be left to
            hide behind.
        first_bytes: the same for the first bucket of each dtype.
    """
    total = sum(param.numel * param.itemsize for param in params)
    fewest = _FEWEST_CODED if any(param.coded for param in params) else _FEWEST_BUCKETS
    cap_bytes = min(cap_bytes, max(total // fewest, first_bytes))
    assert sorted(order) == list(range(len(params))), "every parameter stands in the order once"
    open_buckets: dict[str, list[int]] = {}
    filled: dict[str, int] = {}
    closed: list[list[int]] = []
    began: set[str] = set()
    for index in order:
        param = params[index]
        group = open_buckets.setdefault(param.dtype, [])
        group.append(index)
        filled[param.dtype] = filled.get(param.dtype, 0) + param.numel * param.itemsize
        limit = cap_bytes if param.dtype in began else min(first_bytes, cap_bytes)
        if filled[param.dtype] >= limit:
            began.add(param.dtype)
            closed.append(open_buckets.pop(param.dtype))
            filled[param.dtype] = 0
    place = {index: position for position, index in enumerate(order)}
    closed += [group for group in open_buckets.values() if group]
    closed.sort(key=lambda group: place[group[-1]])
    return tuple(_lay_out(number, group, params) for number, group in enumerate(closed))


def _lay_out(number: int, group: Sequence[int], params: Sequence[Parameter]) -> BucketPlan:
    first = params[group[0]]
    align = max(1, _ALIGN // first.itemsize)
    coded = [index for index in group if params[index].coded]
    plain = [index for index in group if not params[index].coded]
    offsets: list[int] = []
    end = 0
    for index in coded:
        offsets.append(end)
        end += params[index].numel
    coded_numel = end
    end = -(-end // align) * align
    for index in plain:
        offsets.append(end)
        end = -(-(end + params[index].numel) // align) * align
    return BucketPlan(
        index=number,
        dtype=first.dtype,
        itemsize=first.itemsize,
        params=(*coded, *plain),
        offsets=tuple(offsets),
        used_offset=end,
        numel=end + len(group),
        coded_numel=coded_numel,
    )


def place_buckets(plans: Sequence[BucketPlan]) -> tuple[tuple[int, ...], int]:
    """Where each bucket starts in one arena of them all, in bytes, and the arena's size."""
    starts: list[int] = []
    end = 0
    for plan in plans:
        starts.append(end)
        end = -(-(end + plan.nbytes) // _ALIGN) * _ALIGN
    return tuple(starts), end


def arena_bytes(params: Sequence[Parameter]) -> int:
    """Bytes that hold the buckets of ``params`` in any order: gradients, flags and gaps."""
    return sum(
        -(-param.numel * param.itemsize // _ALIGN) * _ALIGN + param.itemsize + 2 * _ALIGN
        for param in params
    )
