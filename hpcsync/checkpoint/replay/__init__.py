"""The replay log: what every step's update came from, so that a killed job loses no step.

    log = ReplayLog(folder, parts.engine, parts.parallel.reducer, runtime, config.comm, lineage)

    fresh run     log.start(0)                     once the state of step 0 is saved
    each step     log.record(result)               right after ``engine.step``, on every rank,
                                                   before the agreement and any ``state_dict``
    checkpoint    log.start(step)                  when the snapshot of ``step`` has been taken
                  log.published(step)              when it is whole on disk: older parts go
    resume        last = log.recover(step, told)   after the state of ``step`` was loaded;
                                                   collective; leaves the log open for ``record``
    end           log.close()

``lineage`` is a random word that rank 0 makes for a new run, that is saved in each checkpoint and
handed on by whoever resumes in place: a log of another run is refused by it. ``told`` is called
with each step that was replayed (rank's own StepResult), so that the caller can advance the data.
``log.problem`` is empty, or says in one line why nothing is logged until the next ``start``.
"""

from __future__ import annotations

from .log import ReplayLog

__all__ = ["ReplayLog"]
