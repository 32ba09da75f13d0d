"""What codecs hold back of each parameter: kept when buckets are laid out anew, and in states.

What coding lost is kept where it was coded: by the sender, a rank of each node, of its node's
sum; by the owner, one rank of all, of the mean. Buckets may be laid out anew, so that another
rank of the node codes a parameter, or another node owns it. Then a node's stores are put together
by parameter, and dealt out again:

    pending = what its senders hold back + what its owners hold back x number of ranks

of which every element has one owner or sender in the new layout on each node. (Low precision is
divided in part within the nodes: then by what is left.) Where all ranks code among themselves, each
is a node of its own in this.

A state goes on with other ranks, nodes or buckets in the same way, over the whole job: what is
pending of each parameter, in units of the mean, is dealt out in equal parts to all who code it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..codecs.base import Floats
from ..collectives import Collective, Collectives
from ..collectives.coding import Held
from ..runtime import Runtime
from .plan import BucketPlan, Parameter

ERROR = "error"  # the field that an owner keeps in units of the mean

# By field and parameter's name.
Pending = Mapping[str, Mapping[str, Floats]]


class Exchanged(Protocol):
    """A bucket, as far as stores are concerned."""

    @property
    def plan(self) -> BucketPlan: ...

    @property
    def collective(self) -> Collective: ...


class Fragment(NamedTuple):
    """Values of one field that this rank holds of a parameter, from element ``start`` on.

    Attributes:
        scale: from the units of errors to those of the mean.
    """

    role: str
    field: str
    start: int
    values: Floats
    scale: float


def fragments(buckets: Sequence[Exchanged]) -> Iterator[tuple[int, Fragment]]:
    """What this rank's stores hold, by the parameter's index."""
    read = _Reader()
    for bucket, held, index, low, high in _overlaps(buckets):
        start = bucket.plan.offsets[bucket.plan.params.index(index)]
        for field in held.store.fields:
            values = read(held, field)[low - held.start : high - held.start]
            scale = held.divisor / held.total
            yield index, Fragment(held.role, field, low - start, values, scale)


def gather(
    collectives: Collectives,
    buckets: Sequence[Exchanged],
    params: Sequence[Parameter],
    where: str = "rail",
) -> Pending:
    """What the ranks of this node hold back, or this rank if coding is between all; collective.

    In units of the sum that senders code parts of.
    """
    starts = np.concatenate([[0], np.cumsum([param.numel for param in params])])
    names = sorted({field for _, held, *_ in _overlaps(buckets) for field in held.store.fields})
    every = collectives.runtime.allgather_object(names)
    total = {
        field: np.zeros(starts[-1], np.float32)
        for field in sorted({name for each in every for name in each})
    }
    read = _Reader()
    for bucket, held, index, low, high in _overlaps(buckets):
        at = starts[index] - bucket.plan.offsets[bucket.plan.params.index(index)]
        for field in held.store.fields:
            values = read(held, field)[low - held.start : high - held.start]
            factor = held.divisor if field == ERROR else 1
            total[field][at + low : at + high] += values * np.float32(factor)
    if where == "rail":
        for values in total.values():
            collectives.node_sum(values)
    return {
        field: {
            param.name: values[low:high]
            for param, (low, high) in zip(params, pairwise(starts), strict=True)
        }
        for field, values in total.items()
    }


def deal(pending: Pending, buckets: Sequence[Exchanged], params: Sequence[Parameter]) -> None:
    """Put what is pending into the stores of a new layout; who joined holds nothing."""
    for bucket, held, index, low, high in _overlaps(buckets):
        start = bucket.plan.offsets[bucket.plan.params.index(index)]
        for field in held.store.fields:
            found = pending.get(field, {}).get(params[index].name)
            if found is None or len(found) != params[index].numel:
                continue
            values = np.array(held.store.read(field))
            part = found[low - start : high - start]
            divisor = held.divisor if field == ERROR else 1
            values[low - held.start : high - held.start] = part / divisor
            held.store.write(field, values)


def rescale(buckets: Sequence[Exchanged], factor: float) -> None:
    """Multiply all that is held back: gradients come in other units from now on."""
    for bucket in buckets:
        for held in bucket.collective.held:
            for field in held.store.fields:
                held.store.write(field, held.store.read(field) * np.float32(factor))


def state(
    buckets: Sequence[Exchanged], params: Sequence[Parameter]
) -> dict[str, list[dict[str, Any]]]:
    """What this rank holds, by parameter: each fragment as a dict of its attributes.

    The values may be the stores' own.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for index, part in fragments(buckets):
        found.setdefault(params[index].name, []).append(part._asdict())
    return found


class Sums:
    """What is pending of each parameter over a job whose ranks' states are added.

    Errors are added, in units of the mean. Of other fields the mean over those who hold one is
    taken: what ranks hold of the same element is alike, or of equal weight.
    """

    def __init__(self, params: Sequence[Parameter]) -> None:
        self._params = {param.name: param for param in params}
        self._sums: dict[str, dict[str, Floats]] = {}
        self._counts: dict[str, dict[str, Floats]] = {}

    def add(self, held: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """One rank's ``state``; parameters of other sizes, or not there any more, are left out."""
        for name, parts in held.items():
            for part in parts:
                values = np.asarray(part["values"], np.float32)
                field, start = str(part["field"]), int(part["start"])
                stop = start + values.shape[0]
                if name not in self._params or stop > self._params[name].numel or start < 0:
                    continue
                sums, counts = self._of(field, name)
                scale = part["scale"] if field == ERROR else 1
                sums[start:stop] += values * np.float32(scale)
                counts[start:stop] += 1

    def over(self, runtime: Runtime) -> Pending:
        """The sums over all ranks' ``Sums``; collective."""
        told = runtime.allgather_object([(f, n) for f, names in self._sums.items() for n in names])
        found: dict[str, dict[str, Floats]] = {}
        for field, name in sorted({pair for pairs in told for pair in pairs}):
            sums, counts = self._of(field, name)
            runtime.allreduce_array(sums, "sum")
            if field != ERROR:
                runtime.allreduce_array(counts, "sum")
                sums /= np.maximum(counts, 1)
            found.setdefault(field, {})[name] = sums
        return found

    def _of(self, field: str, name: str) -> tuple[Floats, Floats]:
        size = self._params[name].numel
        sums = self._sums.setdefault(field, {}).setdefault(name, np.zeros(size, np.float32))
        counts = self._counts.setdefault(field, {}).setdefault(name, np.zeros(size, np.float32))
        return sums, counts


def deal_mean(
    pending: Pending, buckets: Sequence[Exchanged], params: Sequence[Parameter], holders: int
) -> None:
    """Put what is pending over the job into stores that hold nothing.

    Args:
        pending: errors in units of the mean.
        holders: how many ranks code each element.
    """
    for bucket, held, index, low, high in _overlaps(buckets):
        start = bucket.plan.offsets[bucket.plan.params.index(index)]
        for field in held.store.fields:
            found = pending.get(field, {}).get(params[index].name)
            if found is None:
                continue
            values = np.array(held.store.read(field))
            scale = held.total / held.divisor / holders if field == ERROR else 1
            part = found[low - start : high - start] * np.float32(scale)
            values[low - held.start : high - held.start] = part
            held.store.write(field, values)


def restore(
    fragments: Mapping[int, Sequence[Mapping[str, Any]]], buckets: Sequence[Exchanged]
) -> bool:
    """Write fragments of the same layout back, to the same bits; False if the layout is another."""
    left = {
        (index, part["role"], part["field"], part["start"]): np.asarray(part["values"], np.float32)
        for index, parts in fragments.items()
        for part in parts
    }
    fields: dict[tuple[int, str], Floats] = {}
    stores: dict[int, Held] = {}
    for bucket, held, index, low, high in _overlaps(buckets):
        start = bucket.plan.offsets[bucket.plan.params.index(index)]
        stores[id(held)] = held
        for field in held.store.fields:
            values = left.pop((index, held.role, field, low - start), None)
            if values is None or values.shape[0] != high - low:
                return False
            own = fields.setdefault((id(held), field), np.array(held.store.read(field)))
            own[low - held.start : high - held.start] = values
    if left:
        return False
    for (which, field), values in fields.items():
        stores[which].store.write(field, values)
    return True


class _Reader:
    """Reads each store once, for all its parameters: one of a device makes the host wait."""

    def __init__(self) -> None:
        self._last: Held | None = None
        self._values: dict[str, Floats] = {}

    def __call__(self, held: Held, field: str) -> Floats:
        if held is not self._last:
            self._last, self._values = held, {}
        if field not in self._values:
            self._values[field] = held.store.read(field)
        return self._values[field]


def _overlaps(
    buckets: Sequence[Exchanged],
) -> Iterator[tuple[Exchanged, Held, int, int, int]]:
    """Each part of a store that lies in one parameter: (bucket, store, parameter, low, high).

    The bounds are elements of the bucket.
    """
    for bucket in buckets:
        plan = bucket.plan
        ends = [*plan.offsets[1:], plan.coded_numel]
        for held in bucket.collective.held:
            for index, start, end in zip(plan.params, plan.offsets, ends, strict=True):
                low, high = max(start, held.start), min(min(end, plan.coded_numel), held.stop)
                if low < high:
                    yield bucket, held, index, low, high
