"""From what all ranks kept of a step's means back to the gradients of the update."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...codecs import Codec, Matrix, Moment, PieceCodec, SumCodec
from ...collectives.kept import MEAN, PLAIN, SUMS, Keeper, Kept, decode_mean, decode_sums, within
from ...device import DType, dtype_of
from ...device.cpu import narrow
from ...errors import CheckpointError
from ...gradients.bucket import dense_strides
from ...gradients.reducer import Reducer
from .records import Bytes

_GAP = 64  # elements, at most, between parameters of a bucket


def describe(reducer: Reducer, keepers: Sequence[tuple[int, Keeper]]) -> dict[str, Any]:
    """The buckets, and this rank's pieces of them, for JSON."""
    return {
        "codec": reducer.compression.config.codec if reducer.compression else "none",
        "parameters": list(reducer.parameters),
        "buckets": [dataclasses.asdict(plan) for plan in reducer.buckets],
        "pieces": [[bucket, dataclasses.asdict(keeper.kept)] for bucket, keeper in keepers],
    }


@dataclass(frozen=True)
class _Bucket:
    """Memory like a bucket's own, but of this rank alone."""

    dtype: DType
    memory: np.ndarray[Any, Any]
    flat: Tensor
    matrices: tuple[Matrix, ...]
    end: int  # of the parameters


@dataclass(frozen=True)
class _Piece:
    rank: int
    place: int  # in the rank's list
    bucket: int
    kept: Kept


class Means:
    """Decodes steps of one layout of the buckets.

    Args:
        told: ``describe`` of each rank.

    Raises:
        CheckpointError: the ranks' parts do not belong together, or not to this model.
    """

    def __init__(self, reducer: Reducer, told: Sequence[Mapping[str, Any]]) -> None:
        first = told[0]
        if any(each[key] != first[key] for each in told for key in ("codec", "buckets")):
            raise CheckpointError("the ranks logged other buckets")
        self._params = reducer.parameters
        if list(self._params) != first["parameters"]:
            raise CheckpointError("other parameters are trained")
        self._buckets: list[_Bucket] = []
        self._views: dict[str, Tensor] = {}
        for plan in first["buckets"]:
            self._lay_out(plan)
        self._pieces = [
            _Piece(rank, place, bucket, Kept(**kept))
            for rank, each in enumerate(told)
            for place, (bucket, kept) in enumerate(each["pieces"])
        ]
        self._check()
        self._codec: Codec | None = None
        if any(piece.kept.kind != PLAIN for piece in self._pieces):
            if reducer.compression is None:
                raise CheckpointError(f"codec {first['codec']} is not in use here")
            self._codec = reducer.compression.named(first["codec"])

    def give(
        self, steps: Sequence[Mapping[str, Any]], payloads: Sequence[Bytes], factor: float
    ) -> None:
        """Set the gradients of all parameters to those of a step's update.

        Args:
            steps: what each rank logged of it.
            payloads: each rank's pieces.
            factor: by which the means were multiplied, after they were decoded.

        Raises:
            CheckpointError: pieces of other sizes than they can have.
        """
        sums: dict[tuple[int, int], list[tuple[_Piece, list[Bytes], Moment]]] = {}
        for piece, arrays in self._taken(steps, payloads):
            bucket, kept = self._buckets[piece.bucket], piece.kept
            if kept.kind == PLAIN:
                self._set_plain(bucket, kept, arrays)
            elif kept.kind == MEAN:
                assert isinstance(self._codec, PieceCodec)
                values = np.empty(kept.count, np.float32)
                decode_mean(self._codec, kept, arrays[0], values)
                self._set(bucket, kept, values, factor)
            else:
                step, seed = steps[piece.rank]["moments"][piece.place]
                found = (piece, arrays, Moment(step, 0, seed))
                sums.setdefault((piece.bucket, kept.start), []).append(found)
        for parts in sums.values():
            parts.sort(key=lambda part: part[0].kept.share)
            self._add_up(parts, factor)
        missing = set(steps[0]["none"])
        for name, param in self._params.items():
            param.grad = None if name in missing else self._views[name]

    def _add_up(self, parts: list[tuple[_Piece, list[Bytes], Moment]], factor: float) -> None:
        piece, _, moment = parts[0]
        bucket, kept = self._buckets[piece.bucket], piece.kept
        assert isinstance(self._codec, SumCodec)
        matrices = within(bucket.matrices, kept.start, kept.count)
        values = np.empty(kept.count, np.float32)
        slices = [arrays for _, arrays, _ in parts]
        decode_sums(self._codec, kept, matrices, slices, moment, values)
        self._set(bucket, kept, values, factor)

    def _taken(
        self, steps: Sequence[Mapping[str, Any]], payloads: Sequence[Bytes]
    ) -> Iterator[tuple[_Piece, list[Bytes]]]:
        """Each piece with its arrays, as views of its rank's payload."""
        ends = [0] * len(payloads)
        for piece in self._pieces:
            arrays = []
            for nbytes in steps[piece.rank]["sizes"][piece.place]:
                at = ends[piece.rank]
                arrays.append(payloads[piece.rank][at : at + nbytes])
                ends[piece.rank] = at + nbytes
            yield piece, arrays

    def _lay_out(self, plan: Mapping[str, Any]) -> None:
        names = [list(self._params)[index] for index in plan["params"]]
        sizes = [self._params[name].numel() for name in names]
        numel, dtype = int(plan["numel"]), dtype_of(plan["dtype"])
        if numel > sum(sizes) + (len(sizes) + 1) * (_GAP + 1):
            raise CheckpointError("a bucket is larger than its parameters")
        memory = np.zeros(numel, dtype.storage)
        flat = torch.from_numpy(memory.view(np.uint8)).view(getattr(torch, plan["dtype"]))
        matrices = []
        for name, start in zip(names, plan["offsets"], strict=True):
            param = self._params[name]
            if param.dtype != flat.dtype or not 0 <= start <= numel - param.numel():
                raise CheckpointError(f"parameter {name} is not as it was")
            part = flat[start : start + param.numel()]
            self._views[name] = part.as_strided(
                param.size(), dense_strides(param), storage_offset=part.storage_offset()
            )
            if start < plan["coded_numel"]:
                matrices.append(Matrix(start, tuple(param.shape)))
        self._buckets.append(_Bucket(dtype, memory, flat, tuple(matrices), plan["used_offset"]))

    def _check(self) -> None:
        """All elements of all parameters are somebody's, and no piece is beyond its bucket."""
        parts: list[set[tuple[int, int]]] = [set() for _ in self._buckets]
        shares: dict[tuple[int, int], int] = {}
        for piece in self._pieces:
            kept = piece.kept
            if not 0 <= piece.bucket < len(self._buckets) or kept.kind not in (MEAN, PLAIN, SUMS):
                raise CheckpointError("a piece is of no bucket, or of no known kind")
            if kept.start < 0 or kept.count < 0:
                raise CheckpointError("a piece is nowhere in its bucket")
            parts[piece.bucket].add((kept.start, kept.start + kept.count))
            if kept.kind == SUMS:
                key = (piece.bucket, kept.start)
                shares[key] = shares.get(key, kept.shares) - 1
        if any(shares.values()):
            raise CheckpointError("slices of sums are missing")
        for bucket, found in zip(self._buckets, parts, strict=True):
            end = 0
            for start, stop in sorted(found):
                if start != end:
                    raise CheckpointError("pieces of a bucket are missing")
                end = stop
            if not bucket.end <= end <= bucket.memory.shape[0]:
                raise CheckpointError("pieces of a bucket are missing")

    @staticmethod
    def _set_plain(bucket: _Bucket, kept: Kept, arrays: Sequence[Bytes]) -> None:
        place = bucket.memory[kept.start : kept.start + kept.count].view(np.uint8)
        if len(arrays) != 1 or arrays[0].shape != place.shape:
            raise CheckpointError(f"{kept.count} elements are not {place.nbytes} bytes")
        place[:] = arrays[0]

    @staticmethod
    def _set(bucket: _Bucket, kept: Kept, values: Any, factor: float) -> None:
        """What was decoded, rounded as the exchange does, and multiplied as the engine does."""
        place = slice(kept.start, kept.start + kept.count)
        dtype = bucket.dtype
        wide = dtype.storage == dtype.accumulate
        bucket.memory[place] = values if wide else narrow(values, dtype)
        if factor != 1.0:
            torch._foreach_mul_([bucket.flat[place]], factor)
