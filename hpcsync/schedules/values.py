"""Symbolic values of chunks as a group of schedules runs: which ranks' shares, added in what order.

Part of `verify`. A value is a set of ranks, one bit each, and a hash of its order of additions.
Needs NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.schedules.base import Kind
from hpcsync.schedules.messages import Group, Ints, Messages, VerifyError

Words = NDArray[np.uint64]


def _mix(left: Any, right: Any) -> Any:
    """Hash of the sum of two hashed values: commutes, as a sum of two numbers does to the bit, but
    does not associate."""
    mixed = left + right
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)


class Flow:
    """The values of chunks [start, stop) through the rounds of a group."""

    def __init__(
        self,
        group: Group,
        messages: Messages,
        moved: Ints,
        ended: Ints,
        start: int,
        stop: int,
        words: int,
    ) -> None:
        self.group, self.start, self.width = group, start, stop - start
        self._expand(messages, moved, ended, stop)
        shape = (group.size, self.width)
        self.bits = np.zeros((*shape, words), np.uint64)
        self.order = np.zeros(shape, np.uint64)
        self.sent_in = np.full(shape, -1)
        ranks = np.arange(group.size)
        if group.kind is Kind.ALLGATHER:
            for rank, (lo, hi) in enumerate(group.owned.clip(start, stop) - start):
                self.bits[rank, lo:hi] = 1
            self.full = np.ones(1, np.uint64)
        else:
            mine = np.uint64(1) << (ranks % 64).astype(np.uint64)
            self.bits[ranks, :, ranks // 64] = mine[:, None]
            self.order[:] = _mix(ranks.astype(np.uint64), np.uint64(1))[:, None]
            self.full = np.bitwise_or.reduce(self.bits[:, 0])

    def _expand(self, messages: Messages, moved: Ints, ended: Ints, stop: int) -> None:
        """One operand a chunk and message, sorted by (round, rank, chunk, source), and the own
        value of every rank that reduces among them."""
        lo, hi = messages.lo.clip(self.start, stop), messages.hi.clip(self.start, stop)
        which = np.repeat(np.arange(len(lo)), hi - lo)
        offsets = np.concatenate([[0], (hi - lo).cumsum()])
        chunk = np.arange(len(which)) - offsets[which] + (lo - self.start)[which]
        src, dst_step = messages.src[which], messages.dst_step[which]
        src_step, when = messages.src_step[which], moved[which]
        summed = self.group.reduces[dst_step]
        sums = np.sort(dst_step[summed] * self.width + chunk[summed])
        own_step, own_chunk = np.divmod(sums[np.diff(sums, prepend=-1) > 0], self.width)
        self.src = np.concatenate([src, self.group.rank_of(own_step)])
        self.chunk = np.concatenate([chunk, own_chunk])
        self.dst_step = np.concatenate([dst_step, own_step])
        self.src_step = np.concatenate([src_step, np.full(len(own_step), -1)])
        self.moved = np.concatenate([when, ended[own_step]])
        self.dst = self.group.rank_of(self.dst_step)
        self.ended = ended[self.dst_step]
        key = (self.ended * self.group.size + self.dst) * self.width + self.chunk
        by_key = (key * self.group.size + self.src).argsort(kind="stable")
        for name in ("src", "chunk", "dst_step", "src_step", "moved", "dst", "ended"):
            setattr(self, name, getattr(self, name)[by_key])
        key = key[by_key]
        self.heads = np.flatnonzero(np.diff(key, prepend=-1))
        self.lengths = np.diff(self.heads, append=len(key))

    def run(self) -> None:
        early = np.flatnonzero(self.moved < self.ended)
        early = early[self.moved[early].argsort(kind="stable")]
        self.held = np.full(len(self.src), -1)
        self.held[early] = np.arange(len(early))
        self.held_bits = np.empty((len(early), self.bits.shape[2]), np.uint64)
        self.held_order = np.empty(len(early), np.uint64)
        rounds = int(self.ended[-1]) + 1 if len(self.ended) else 0
        early_at = np.searchsorted(self.moved[early], np.arange(rounds + 1))
        round_at = np.searchsorted(self.ended, np.arange(rounds + 1))
        head_at = np.searchsorted(self.ended[self.heads], np.arange(rounds + 1))
        for now in range(rounds):
            if early_at[now] < early_at[now + 1]:
                self._hold(early[early_at[now] : early_at[now + 1]])
            self._end_steps(
                slice(round_at[now], round_at[now + 1]), slice(head_at[now], head_at[now + 1])
            )
        self._check_result()

    def _hold(self, index: Ints) -> None:
        """Messages that move now into steps that end later: keep what the sender has now."""
        src, chunk = self.src[index], self.chunk[index]
        self.held_bits[self.held[index]] = self.bits[src, chunk]
        self.held_order[self.held[index]] = self.order[src, chunk]
        self.sent_in[src, chunk] = self.src_step[index]

    def _operand(self, index: Ints) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        src, chunk = self.src[index], self.chunk[index]
        bits, order = self.bits[src, chunk], self.order[src, chunk]
        held = self.held[index]
        if (kept := held >= 0).any():
            bits[kept], order[kept] = self.held_bits[held[kept]], self.held_order[held[kept]]
        if (empty := ~bits.any(axis=1)).any():
            raise self._error(index[empty][0], f"rank {src[empty][0]} has nothing to give")
        return bits, order

    def _end_steps(self, operands: slice, groups: slice) -> None:
        fresh = np.arange(operands.start, operands.stop)
        fresh = fresh[(self.held[fresh] < 0) & (self.src_step[fresh] >= 0)]
        self.sent_in[self.src[fresh], self.chunk[fresh]] = self.src_step[fresh]
        heads, lengths = self.heads[groups], self.lengths[groups]
        copies = ~self.group.reduces[self.dst_step[heads]]
        if (bad := copies & (lengths > 1)).any():
            raise self._error(heads[bad][0], "is copied from two ranks in one step")
        dst, chunk = self.dst[heads], self.chunk[heads]
        if (bad := copies & (self.sent_in[dst, chunk] == self.dst_step[heads])).any():
            raise self._error(heads[bad][0], "is copied over while it is sent")
        bits, order = self._operand(heads)
        for nth in range(1, int(lengths.max(initial=0))):
            more = np.flatnonzero(lengths > nth)
            index = heads[more] + nth
            add_bits, add_order = self._operand(index)
            if (twice := (bits[more] & add_bits).any(axis=1)).any():
                what = f"the share of rank {_first_bit((bits[more] & add_bits)[twice][0])}"
                raise self._error(index[twice][0], f"{what} is added twice")
            bits[more] |= add_bits
            order[more] = _mix(order[more], add_order)
        self.bits[dst, chunk] = bits
        self.order[dst, chunk] = order

    def _error(self, operand: Any, problem: str) -> VerifyError:
        rank, step = self.group.place(int(self.dst_step[operand]))
        return VerifyError(problem, rank, step, int(self.chunk[operand]) + self.start)

    def _check_result(self) -> None:
        wrong = (self.bits != self.full).any(axis=2)
        if self.group.kind is Kind.REDUCE_SCATTER:
            owned = np.zeros_like(wrong)
            for rank, (lo, hi) in enumerate(
                self.group.owned.clip(self.start, self.start + self.width) - self.start
            ):
                owned[rank, lo:hi] = True
            wrong &= owned
        for rank, chunk in np.argwhere(wrong)[:1]:
            missing = _first_bit(self.bits[rank, chunk] ^ self.full)
            what = (
                "is missing"
                if self.group.kind is Kind.ALLGATHER
                else f"ends without the share of rank {missing}"
            )
            raise VerifyError(what, int(rank), chunk=int(chunk) + self.start)
        if self.group.kind is Kind.ALLREDUCE:
            for rank, chunk in np.argwhere(self.order != self.order[0])[:1]:
                what = "is added up in another order than on rank 0"
                raise VerifyError(what, int(rank), chunk=int(chunk) + self.start)


def _first_bit(words: NDArray[np.uint64]) -> int:
    word = int(np.flatnonzero(words)[0])
    value = int(words[word])
    return 64 * word + (value & -value).bit_length() - 1
