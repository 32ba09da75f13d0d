"""What top-k and threshold share: the store, the choice of elements, the owner's part.

The store accumulates what was not sent yet (Lin et al., Deep Gradient Compression, arXiv
1712.01887, algorithm 4). With momentum m, g the new values, u and v the store's fields:

    u = m u + g        momentum correction, section 3.1
    v = v + u          local accumulation
    send some of v; where it was sent, u = 0 (momentum factor masking, section 3.2), and v keeps
    what rounding to bfloat16 lost

Without momentum v = v + g. The owner of a piece treats its own values like this, too: u of its own
values, then the sum over ranks of what they sent and its own u, divided, is what v accumulates.

If an element of v or u would become NaN or Inf, it stays as it was, the others accumulate, and the
piece is sent as poison: all its elements are NaN.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels, address, f32, pointer, size_t, u64
from . import sparse_form
from .base import Bytes, Floats, Moment, PieceCodec, Settings, Store, divide

_quiet = np.errstate(over="ignore", invalid="ignore")  # NaN and Inf are passed on

ERROR, VELOCITY = "error", "velocity"


def kept(made: Floats, field: Floats) -> bool:
    """Write ``made`` to a store's field where it is finite; whether all of it is."""
    finite = np.isfinite(made)
    np.copyto(field, made, where=finite)
    return bool(finite.all())


class SparseCodec(PieceCodec):
    """Sends the elements of largest magnitude, and holds the others back."""

    block = sparse_form.SMALL

    def __init__(self, settings: Settings, kernels: Kernels | None = None) -> None:
        super().__init__(settings)
        self._native = Native(kernels) if kernels else None

    @abstractmethod
    def most(self, count: int, step: int) -> int:
        """Most elements of ``count`` that a sender sends in a step."""

    def most_of_mean(self, count: int, step: int) -> int:
        """Most elements of the mean that an owner sends."""
        return self.most(count, step)

    @abstractmethod
    def minimum(self) -> float:
        """Least magnitude that is sent."""

    @property
    def fixed(self) -> bool:
        return False

    def store(self, count: int, role: str) -> Store | None:
        if not self.settings.error_feedback:
            return None
        return Store(count, [ERROR, VELOCITY] if self.settings.momentum else [ERROR])

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        momentum = self.settings.momentum if store else 0.0
        most = self.most(values.shape[0], moment.step)
        return self._encode(values, most, 1, momentum, out, store, moment)

    def decode(self, data: Bytes, out: Floats) -> None:
        if self._native:
            self._native.decode(pointer(data), out.shape[0], pointer(out))
        elif out.shape[0]:
            entries = sparse_form.unpack(data, out.shape[0])
            out[:] = np.nan if entries is None else 0.0
            if entries is not None:
                out[entries[0]] = entries[1]

    @_quiet
    def decode_add(self, data: Bytes, out: Floats) -> None:
        if self._native:
            self._native.decode_add(pointer(data), out.shape[0], pointer(out))
        elif out.shape[0]:
            entries = sparse_form.unpack(data, out.shape[0])
            if entries is None:
                out[:] = np.nan
            else:
                out[entries[0]] += entries[1]

    @_quiet
    def combine(
        self,
        own: Floats,
        place: int,
        others: Sequence[Bytes],
        divisor: int,
        out: Bytes,
        store: Store | None,
        moment: Moment,
    ) -> int:
        masked = store if self.settings.momentum else None
        if masked:
            self._accelerate(own, masked.read(VELOCITY))
        # Two numbers have one sum whatever their order: the first of the others, if it comes
        # before the own values, can be added to them.
        if place > 1:
            before = np.empty_like(own)
            self.decode(others[0], before)
            for data in others[1:place]:
                self.decode_add(data, before)
            np.add(before, own, out=own)
        for data in others[place if place > 1 else 0 :]:
            self.decode_add(data, own)
        if not store:
            divide(own, divisor)
            divisor = 1
        most = self.most_of_mean(own.shape[0], moment.step)
        used = self._encode(own, most, divisor, 0.0, out, store, moment)
        if masked:
            self._clear(out[:used], masked.read(VELOCITY))
        self.decode(out[:used], own)
        return used

    @_quiet
    def _encode(
        self,
        values: Floats,
        k: int,
        divisor: int,
        momentum: float,
        out: Bytes,
        store: Store | None,
        moment: Moment,
    ) -> int:
        """Code at most k of v + (m u + values / divisor), whose fields the store holds."""
        count = values.shape[0]
        error = store.read(ERROR) if store else None
        velocity = store.read(VELOCITY) if store and momentum else None
        minimum = self.minimum()
        if self._native:
            return self._native.encode(
                values, divisor, momentum, velocity, error, k, minimum, moment.seed, out
            )
        if count == 0:
            return 0
        made = values.copy()
        divide(made, divisor)
        if velocity is not None:
            made += np.float32(momentum) * velocity
            kept(made, velocity)
        if error is not None:
            made += error
        if not (np.isfinite(made).all() if error is None else kept(made, error)):
            return sparse_form.poison(out)
        places = sparse_form.chosen(made, k, minimum, moment.seed)
        used = sparse_form.pack(made, places, out, error)
        if velocity is not None:
            self._clear(out[:used], velocity)
        return used

    @_quiet
    def _accelerate(self, values: Floats, velocity: Floats) -> None:
        """Momentum correction: values and velocity become m velocity + values."""
        momentum = self.settings.momentum
        if self._native:
            self._native.momentum(pointer(values), momentum, pointer(velocity), values.shape[0])
        else:
            values += np.float32(momentum) * velocity
            kept(values, velocity)

    def _clear(self, data: Bytes, field: Floats) -> None:
        """Zero a field where the coded piece has entries."""
        if self._native:
            self._native.clear(pointer(data), field.shape[0], pointer(field))
        elif field.shape[0]:
            entries = sparse_form.unpack(data, field.shape[0])
            if entries is not None:
                field[entries[0]] = 0.0


class Native:
    """The kernels of this family, and room for their candidates, a thread."""

    def __init__(self, kernels: Kernels) -> None:
        self._scratch = kernels.function("sparse_scratch", size_t, size_t, size_t, f32)
        self._encode = kernels.function(
            "sparse_encode",
            size_t,
            *(address, f32, f32, address, address, size_t, size_t, f32, u64, address, address),
        )
        self.decode = kernels.function("sparse_decode", None, address, size_t, address)
        self.decode_add = kernels.function("sparse_decode_add", None, address, size_t, address)
        self.clear = kernels.function("sparse_clear", None, address, size_t, address)
        self.momentum = kernels.function("sparse_momentum", None, address, f32, address, size_t)
        self._rooms = threading.local()

    def encode(
        self,
        values: Floats,
        divisor: int,
        momentum: float,
        velocity: Floats | None,
        error: Floats | None,
        k: int,
        minimum: float,
        seed: int,
        out: Bytes,
    ) -> int:
        """See ``hpcsync_sparse_encode``."""
        count = values.shape[0]
        room = self._room(int(self._scratch(count, k, minimum)))
        used: int = self._encode(
            *(pointer(values), divisor, momentum, pointer(velocity), pointer(error)),
            *(count, k, minimum, seed, pointer(room), pointer(out)),
        )
        return used

    def _room(self, words: int) -> NDArray[np.uint32]:
        room: NDArray[np.uint32] | None = getattr(self._rooms, "room", None)
        if room is None or room.shape[0] < words:
            room = self._rooms.room = np.empty(words, np.uint32)
        return room
