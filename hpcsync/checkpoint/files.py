"""Which pieces this rank writes, and into which file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..runtime import Runtime
from ..topology import Topology
from . import folder as folders
from .layout import Dataset, Piece, TensorMeta, datasets, share, whole
from .state import Flat
from .state import metas as metas_of
from .writer import PartWriter


class Share(NamedTuple):
    """This rank's part of a checkpoint: what it writes, and all datasets of its file."""

    pieces: tuple[Piece, ...]
    datasets: tuple[Dataset, ...]


class Files:
    """The writers of a job, and what each of them writes.

    Args:
        first_only: names of common tensors that the first rank stores.
        of_nodes: a file a node, which its ranks write together; else one a rank.
    """

    def __init__(self, runtime: Runtime, first_only: Collection[str], *, of_nodes: bool) -> None:
        self._runtime, self._first_only = runtime, frozenset(first_only)
        self._node: Runtime | None = None
        rank, topology = runtime.rank, runtime.topology
        index = rank
        if of_nodes:
            ranks = topology.node(rank)
            index = topology.node_of(rank)
            comm = runtime.group(ranks)
            alone = Topology.group([runtime.host] * len(ranks))
            self._node = Runtime(comm, alone, runtime.timeout_s, runtime.crowding)
            runtime.on_close(self._node.close)
        leads = not of_nodes or rank == topology.node(rank)[0]
        self.writer = PartWriter(folders.data_file(index, of_nodes), leads)
        self._known: tuple[object, Share] | None = None

    def metas(self, flat: Flat) -> list[TensorMeta]:
        """The tensors of a state."""
        return metas_of(flat.tensors)

    def share(self, common: Flat | None, own: Flat | None) -> Share | None:
        """This rank's share; None if it or a rank that writes the same file has no state.

        Collective over the ranks of a file.
        """
        mine = None if own is None else tuple(self.metas(own))
        told = [mine] if self._node is None else self._node.allgather_object(mine)
        owns = [each for each in told if each is not None]
        if common is None or mine is None or len(owns) < len(told):
            return None
        metas = tuple(self.metas(common))
        key = metas, owns
        if self._known is None or self._known[0] != key:
            self._known = key, self._make(metas, owns, mine)
        return self._known[1]

    def _make(
        self,
        common: tuple[TensorMeta, ...],
        owns: Sequence[tuple[TensorMeta, ...]],
        mine: tuple[TensorMeta, ...],
    ) -> Share:
        rank, topology = self._runtime.rank, self._runtime.topology
        # Node after node, so that what the ranks of one write adjoins, however ranks are placed;
        # the first is rank 0.
        order = [each for node in topology.nodes for each in node]
        shares = share(common, self._runtime.size, self._first_only)
        every = dict(zip(order, shares, strict=True))
        ranks = (rank,) if self._node is None else topology.node(rank)
        beside = [piece for each in ranks for piece in every[each]]
        held = [meta for metas in owns for meta in metas if meta.nbytes]
        found = datasets([*common, *held], [*beside, *map(whole, held)])
        return Share((*every[rank], *(whole(meta) for meta in mine if meta.nbytes)), found)
