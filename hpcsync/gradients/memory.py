"""What codecs hold back of each parameter: kept when buckets are laid out anew, and in states.

What coding lost is kept where it was coded: by the sender, a rank of each node, of its node's
sum; by the owner, one rank of all, of the mean. Buckets may be laid out anew, so that another
rank of the node codes a parameter, or another node owns it. Then a node's stores are put together
by parameter, and dealt out again:

    pending = what its senders hold back + what its owners hold back x number of ranks

of which every element has one owner or sender in the new layout on each node. (Low precision is
divided in part within the nodes: then by what is left.) Where all ranks code among themselves, each
is a node of its own in this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..codecs.base import Floats
from ..collectives import Collective, Collectives
from ..collectives.coding import Held
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
    """Values of one field that this rank holds of a parameter, from element ``start`` on."""

    role: str
    field: str
    start: int
    values: Floats


def fragments(buckets: Sequence[Exchanged]) -> Iterator[tuple[int, Fragment]]:
    """What this rank's stores hold, by the parameter's index."""
    for bucket, held, index, low, high in _overlaps(buckets):
        start = bucket.plan.offsets[bucket.plan.params.index(index)]
        for field in held.store.fields:
            values = held.store.read(field)[low - held.start : high - held.start]
            yield index, Fragment(held.role, field, low - start, values)


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
    names = sorted({part.field for _, part in fragments(buckets)})
    every = collectives.runtime.allgather_object(names)
    total = {
        field: np.zeros(starts[-1], np.float32)
        for field in sorted({name for each in every for name in each})
    }
    for bucket, held, index, low, high in _overlaps(buckets):
        at = starts[index] - bucket.plan.offsets[bucket.plan.params.index(index)]
        for field in held.store.fields:
            values = held.store.read(field)[low - held.start : high - held.start]
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


def restore(
    fragments: Mapping[int, Sequence[tuple[str, str, int, Any]]], buckets: Sequence[Exchanged]
) -> bool:
    """Write fragments of the same layout back, to the same bits; False if the layout is another."""
    left = {
        (index, role, field, start): np.asarray(values, np.float32)
        for index, parts in fragments.items()
        for role, field, start, values in parts
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
