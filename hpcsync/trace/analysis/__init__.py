"""What a trace tells: arrays in, dataclasses out; neither MPI nor torch, nothing is printed.

    intervals    unions of spans, and how much of a window they cover
    account      one rank: where the time of each step went, and its buckets
    tables       all ranks, one in memory at a time: arrays by rank, step and bucket
    exchange     collectives: transfer apart from waiting, algbw and busbw, who came late
    clocks       whose clock is off, and what comparisons clocks can carry
    straggler    ranks that are slow, by lane, against others and against their past
    held, links  buckets that one rank holds back; nodes whose link is slow
    verdict      what the run is bound by, in words, and what to try next
    summary      all of these together
    critical     the path across ranks that a step's length follows
    compare      two runs, with confidence intervals

Clocks of ranks differ, and what two of them say can be compared only as far as they were measured.
Almost all here needs no clocks: durations on one rank are exact, and a collective ends everywhere
at about the same time, so the rank on which it was shortest is the one that came last.
"""

from __future__ import annotations
