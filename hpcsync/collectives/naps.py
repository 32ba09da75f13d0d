"""How long a thread sleeps that waits for other ranks.

Blocking MPI calls spin, and a spinning thread takes the core that computes. When nothing is ready
a thread sleeps for a fraction of the time that nothing has moved, up to ``MOST_SLEEP_S``: short
waits are met at once, and a long one costs a few per cent of a core. Where ranks outnumber cores
both bounds grow with their ratio, or the ranks that wait would keep those that work from a core.
While the main thread computes and waits for nothing, sleeps may be longer, ``PATIENT_SLEEPS_S``:
there is other work to hide behind, and each waking takes time from it. Where a device computes
there is nothing to take from it, and nobody is patient.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

LEAST_SLEEP_S = 60e-6
MOST_SLEEP_S = 1e-3
PATIENT_SLEEPS_S = 1e-3, 4e-3
_SLEEP_SHARE = 0.4  # of the time that nothing has moved
_STANDBY_S = 20e-3  # without a round of somebody else: the thread takes over
_PROMPT_STANDBY_S = 1e-3  # the same where a device computes
_PR_SET_TIMERSLACK = 29


class Naps:
    """Lengths of sleeps, in seconds.

    Args:
        crowding: ranks a core of this host.
        patient: the host computes, so that rounds take time from it.

    Attributes:
        standby_s: without a round of somebody else, until the progress thread does one.
        longest_s: in which nobody looks although all is well.
    """

    def __init__(self, crowding: float, *, patient: bool) -> None:
        self._prompt_s = LEAST_SLEEP_S * max(crowding, 1.0), MOST_SLEEP_S * max(crowding, 1.0)
        self._patient_s = PATIENT_SLEEPS_S if patient else self._prompt_s
        self.standby_s = _STANDBY_S if patient else _PROMPT_STANDBY_S
        self.longest_s = 2 * max(self._prompt_s[1], self._patient_s[1], self.standby_s)

    def length_s(self, idle_s: float, *, awaited: bool) -> float:
        """Of the next one, when nothing has moved for ``idle_s``.

        Args:
            awaited: a thread does nothing but wait.
        """
        least, most = self._prompt_s if awaited else self._patient_s
        return min(max(idle_s * _SLEEP_SHARE, least), most)


def wake_in_time() -> None:
    """Let sleeps of this thread end when they should: with the default slack 20 us take 70."""
    if not getattr(_thread, "told", False):
        _thread.told = True
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


_thread = threading.local()
