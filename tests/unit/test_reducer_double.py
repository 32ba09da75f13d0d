"""A reducer on the test double: a pass that a signal ends half way, and what a replay log keeps."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpcsync.gradients.flags import BetweenHosts
from tests.double.job import Rank
from tests.double.reduced import SHAPES, Trainer, Training, mean

TRAINING = Training("reducer, ipc")


def a_step(trainer: Trainer) -> None:
    """Of a loop; gradients stay."""
    try:
        with trainer.mode:
            trainer.reducer.prepare(trainer.named)
            trainer._backward()
    finally:
        trainer.turn += 1


def test_a_signal_while_flags_are_exchanged_starts_them_no_second_time() -> None:
    def body(rank: Rank) -> list[Any]:
        trainer = Trainer(rank, TRAINING)
        flags = trainer.reducer.layout.flags
        assert isinstance(flags, BetweenHosts)
        if rank.rank == 0:
            with (
                mock.patch.object(flags._collective, "wait", side_effect=KeyboardInterrupt),
                pytest.raises(KeyboardInterrupt),
            ):
                a_step(trainer)
        else:
            a_step(trainer)
        found = []
        for _ in range(2):
            for param in trainer.params:
                param.grad = None
            a_step(trainer)
            grads = [param.grad for param in trainer.params]
            found.append([None if grad is None else rank.device.read(grad) for grad in grads])
        return found

    with TRAINING.job(0) as made:
        for steps in made.run(body):
            for turn, grads in enumerate(steps, start=1):
                for index, grad in enumerate(grads):
                    wanted = mean(2, turn, index)
                    assert grad is None if wanted is None else np.array_equal(grad, wanted)


def test_what_a_replay_log_keeps_is_read_when_the_device_has_made_it() -> None:
    def body(rank: Rank) -> list[Any]:
        trainer = Trainer(rank, TRAINING)
        a_step(trainer)
        reducer = trainer.reducer
        with trainer.mode:
            reducer.prepare(trainer.named)  # the buckets come into their order
            reducer.keep()
        for param in trainer.params:
            param.grad = None
        a_step(trainer)
        found = []
        for bucket, keeper in reducer.keepers:
            kept = keeper.kept
            (data,) = keeper.left().arrays
            found.append((bucket, kept.start, kept.count, data.view(np.float32)))
        offsets = [(plan.index, plan.params, plan.offsets) for plan in reducer.buckets]
        return [found, offsets]

    with TRAINING.job(0) as made:
        ranks = made.run(body)
    flat = {index: np.zeros(1 << 14, np.float32) for index, _, _ in ranks[0][1]}
    for found, _ in ranks:
        for bucket, start, count, data in found:
            flat[bucket][start : start + count] = data
    for index, params, offsets in ranks[0][1]:
        for param, start in zip(params, offsets, strict=True):
            wanted = mean(2, 1, param)
            size = int(np.prod(SHAPES[param]))
            values = np.zeros(size) if wanted is None else wanted.reshape(-1)
            np.testing.assert_array_equal(flat[index][start : start + size], values)
