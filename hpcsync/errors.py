"""Exceptions of hpcsync: what a user may mend, and what went wrong while running.

A ``UserError`` is told in one line and ends the job with exit status 2; anything else is a
failure of the run and comes with a traceback and status 1.
"""

from __future__ import annotations

from collections.abc import Sequence


class HpcsyncError(Exception):
    """Base of all errors that hpcsync raises on purpose."""


class UserError(HpcsyncError, ValueError):
    """Something the user can mend: the message says what is wrong, where, and the fix."""


class ConfigError(UserError):
    """One or more faults of a deck or of overrides, all of them found at once."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class DataError(UserError):
    """Training data that is missing, unreadable or of the wrong form."""


class ModelError(UserError):
    """A model that cannot be found, imported or built."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing, or belongs to another run."""


class DamagedError(CheckpointError):
    """What a checkpoint holds is not what was written: set it aside, take the one before.

    Attributes:
        problems: each fault that was found, with its file and dataset.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("; ".join(self.problems))

    def __reduce__(self) -> tuple[type[DamagedError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class DeviceError(UserError):
    """A device that is missing, cannot be used, or has no room."""


class LaunchError(UserError):
    """The job was started in a way that cannot work."""


class CollectiveTimeout(HpcsyncError):  # noqa: N818  (as the field says it)
    """A collective made no progress for ``comm.timeout_s`` seconds."""


class NonFiniteError(HpcsyncError):
    """The loss, or too many steps' gradients in a row, were NaN or Inf."""
