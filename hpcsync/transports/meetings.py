"""Where the steps of two ranks' schedules meet, for transports that read each other's memory."""

from __future__ import annotations

from collections.abc import Sequence

from ..schedules.base import Schedule, Step


def by_part(step: Step, offsets: Sequence[int]) -> list[tuple[slice, list[int]]]:
    """The received element ranges of a step, each with the ranks that it comes from."""
    parts: dict[tuple[int, int], list[int]] = {}
    for move in step.recvs:
        parts.setdefault((offsets[move.lo], offsets[move.hi]), []).append(move.peer)
    return [(slice(*bounds), peers) for bounds, peers in parts.items() if bounds[0] < bounds[1]]


def offered(step: Step, offsets: Sequence[int], part: slice) -> bool:
    """Whether the step also sends some of these elements."""
    return any(
        offsets[move.lo] < part.stop and part.start < offsets[move.hi] for move in step.sends
    )


def meetings(schedules: Sequence[Schedule], rank: int) -> dict[tuple[int, int, bool], int]:
    """At which of its steps each peer takes its side of this rank's transfers.

    Keys are (own step, peer, whether this rank receives); transfers between two ranks meet in
    order, first with first.
    """
    met: dict[tuple[int, int, bool], int] = {}
    own = schedules[rank].steps
    peers = {move.peer for step in own for move in (*step.sends, *step.recvs)}
    for peer in peers:
        for receives in (True, False):
            mine = [
                index
                for index, step in enumerate(own)
                for move in (step.recvs if receives else step.sends)
                if move.peer == peer
            ]
            theirs = [
                index
                for index, step in enumerate(schedules[peer].steps)
                for move in (step.sends if receives else step.recvs)
                if move.peer == rank
            ]
            for here, there in zip(mine, theirs, strict=True):
                met[here, peer, receives] = there
    return met
