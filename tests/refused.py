"""Command lines that training must refuse, tried one after the other in one job of two ranks.

Whatever is refused on all ranks alike takes the same way to the user, which whole jobs show; what
is said of each needs no job of its own.

As a command: FOLDER, in which cases.json has the words of each case by its name. Rank N leaves what
it would have told of each in told-N.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import launcher

RANKS = 2


def told(
    folder: Path, cases: Mapping[str, Sequence[str]], *, prefix: Sequence[str] = ()
) -> dict[str, str]:
    """The message of each case, by its name; the job runs in ``folder``.

    Args:
        prefix: comes before each rank's command.
    """
    (folder / "cases.json").write_text(json.dumps({name: list(cases[name]) for name in cases}))
    command = [*launcher.mpirun(RANKS), *prefix, sys.executable, "-m", "tests.refused"]
    outcome = launcher.Job([*command, str(folder)], cwd=folder).wait(90 + 5 * len(cases))
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    assert "Traceback" not in outcome.text, outcome.describe()
    found = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(RANKS)]
    for one, *others in zip(*(each.items() for each in found), strict=True):
        assert all(other == one for other in others), (one, others)
    assert list(found[0]) == list(cases)
    return dict(found[0])


def _run(folder: Path) -> int:
    from hpcsync import launch, train
    from hpcsync.config import TopologyConfig

    found: dict[str, str] = {}
    with launch.start(TopologyConfig()) as job:
        for name, words in json.loads((folder / "cases.json").read_text()).items():
            try:
                found[name] = f"was not refused: ended with {train.run(words)}"
            except launch.AgreedError as error:
                found[name] = str(error)
        (folder / f"told-{job.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    from hpcsync import launch

    launch.guard(lambda: _run(Path(sys.argv[1])))
