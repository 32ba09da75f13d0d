"""What a codec costs: as its spans in a trace tell, or measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter, thread_time

import numpy as np

from hpcsync import codecs
from hpcsync.codecs import Codec, Matrix, PieceCodec, SumCodec
from hpcsync.collectives import choice
from hpcsync.collectives.coding import settings_of
from hpcsync.collectives.costs import ITEM, CodecCost, Layout, Load
from hpcsync.trace.analysis.whatif import Seen
from tools import codec_work
from tools.benchmark import MIB, median

from .deck import Deck

_PIECE = 1 << 16  # elements on which a codec is timed
_CODEC_S = 0.02


def traced_codec(
    name: str, seen: Seen, deck: Deck, layout: Layout, loads: Sequence[Load], crowd: float
) -> CodecCost:
    """A codec by its spans, and its bytes by what went over the wire.

    Args:
        crowd: ranks a core, by which spans are longer than the processor time in them.
    """
    group = layout.group(coded=True)
    elements = max(sum(load.coded for load in loads) * group.share, 1.0)
    others, own = elements * (group.ranks - 1) / group.ranks, elements / group.ranks
    plain = sum(load.plain_bytes for load in loads) * group.share * 2
    plain *= (group.ranks - 1) / group.ranks
    sent = max(seen.wire_bytes / group.far - plain, 1.0) / (2 * others)
    try:
        codec: Codec | None = codecs.build(name, settings_of(deck.compress, 0))
    except (ValueError, ImportError):
        codec = None
    segment = float(choice.coded_segment(deck.comm, codec)) if codec else float(MIB)
    if seen.combine_s == 0:
        rounds = _rounds(codec, group.ranks) if isinstance(codec, SumCodec) else 1
        encode, decode = seen.encode_s / elements, seen.decode_s / elements
        return CodecCost(sent, encode / crowd, decode / crowd, 0.0, 0.0, rounds, segment)
    encode, decode = seen.encode_s / others / crowd, seen.decode_s / others / crowd
    combine = max(seen.combine_s / own / crowd - (group.ranks - 2) * decode, 0.0)
    return CodecCost(sent, encode, decode, decode, combine, 0, segment)


def measured_codec(name: str, deck: Deck, layout: Layout) -> CodecCost:
    """What a codec costs on the machine that this runs on.

    Raises:
        ConfigError: there is no such codec.
    """
    codec = codecs.build(name, settings_of(deck.compress, 0))
    segment = float(choice.coded_segment(deck.comm, codec))
    work = {each.name: each for each in codec_work.operations(codec, _PIECE)}
    took = {key: _seconds(each) for key, each in work.items()}
    if isinstance(codec, SumCodec):
        half, ranks = took["exchange"] / 2, layout.group(coded=True).ranks
        matrices, count = codec_work.matrices(_PIECE) if codec.whole else ([], _PIECE)
        nbytes = _sum_bytes(codec, count, matrices, ranks) / count
        return CodecCost(nbytes, half, half, 0.0, 0.0, _rounds(codec, ranks), segment)
    assert isinstance(codec, PieceCodec)
    nbytes = codec.expected(_PIECE) / _PIECE
    each = (took[key] for key in ("encode", "decode", "decode_add", "combine"))
    return CodecCost(nbytes, *each, segment_bytes=segment)


def _rounds(codec: SumCodec, ranks: int) -> int:
    matrices, count = codec_work.matrices(_PIECE) if codec.whole else ([], _PIECE)
    return max(len(codec.forms(count, matrices, max(ranks, 2))), 1)


def _sum_bytes(codec: SumCodec, count: int, matrices: list[Matrix], ranks: int) -> float:
    forms = codec.forms(count, matrices, max(ranks, 2))
    return float(sum(np.dtype(form.dtype).itemsize * form.count for form in forms))


def _seconds(work: codec_work.Operation) -> float:
    """Processor time an element, the median of several calls; the first is not counted."""
    work.run()
    began, times = perf_counter(), []
    while len(times) < 3 or perf_counter() - began < _CODEC_S:
        work.reset()
        before = thread_time()
        work.run()
        times.append(thread_time() - before)
    return float(median(times)) / (work.source / ITEM)
