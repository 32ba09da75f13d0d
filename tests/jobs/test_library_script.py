"""How users' own scripts end, on one rank or on all of them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests import launcher

pytestmark = pytest.mark.usefixtures("mpi")

START = """
import atexit, os, sys, threading, time
import hpcsync
import torch

hpcsync.init()
rank, size = hpcsync.rank(), hpcsync.size()
"""


def run(folder: Path, body: str, ranks: int = 2) -> launcher.Outcome:
    script = folder / "script.py"
    script.write_text(START + textwrap.dedent(body))
    outcome = launcher.run(ranks, str(script), timeout=60)
    outcome.assert_clean()
    return outcome


@pytest.mark.parametrize(
    "leave",
    [
        "sys.exit(3)",
        "raise SystemExit(3)",
        "exit(3)",
        "quit(3)",
        "import argparse; argparse.ArgumentParser().exit(3)",
    ],
)
def test_an_exit_of_one_rank_ends_all(tmp_path: Path, leave: str) -> None:
    outcome = run(tmp_path, f"if rank == 1:\n    {leave}\nhpcsync.barrier()")
    assert outcome.status == 3, outcome.describe()
    assert "Traceback" not in outcome.text
    assert outcome.seconds < 45


def test_what_an_exit_says_is_told(tmp_path: Path) -> None:
    outcome = run(tmp_path, "if rank == 1:\n    sys.exit('no more')\nhpcsync.barrier()")
    assert outcome.status == 1, outcome.describe()
    assert outcome.stderr.count("no more") == 1


@pytest.mark.parametrize("ranks", [0, 2])
def test_exits_that_are_no_failure(tmp_path: Path, ranks: int) -> None:
    body = """
    for status in (3, "no"):
        try:
            sys.exit(status)
        except SystemExit as stop:
            assert stop.code == status
        try:
            raise SystemExit(status)
        except SystemExit as stop:
            assert stop.code == status
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    if rank == 0:
        time.sleep(2)  # the others wait for it
    print("all", hpcsync.allreduce(torch.ones(2), hpcsync.Sum).tolist())
    if rank == 0:
        time.sleep(2)
        print("late", rank)
    sys.exit(0)
    """
    outcome = run(tmp_path, body, ranks)
    assert outcome.status == 0, outcome.describe()
    assert outcome.stderr == "", outcome.describe()
    assert "late 0" in outcome.stdout


def test_errors_of_a_child_are_its_own(tmp_path: Path) -> None:
    body = """
    child = os.fork()
    if child == 0:
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    hpcsync.barrier()
    print("done", rank)
    """
    outcome = run(tmp_path, body)
    assert outcome.status == 0, outcome.describe()
    assert outcome.stdout.count("done") == 2, outcome.describe()


def test_an_exception_of_a_thread_ends_all(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        threading.Thread(target=lambda: 1 / 0).start()
    hpcsync.barrier()
    if rank == 1:
        time.sleep(30)
    hpcsync.barrier()
    """
    outcome = run(tmp_path, body)
    assert outcome.status == 1, outcome.describe()
    assert outcome.stderr.count("Traceback") == 1, outcome.describe()
    assert "rank 1 on" in outcome.stderr
    assert outcome.seconds < 30


def test_an_error_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    outcome = run(tmp_path, "raise RuntimeError('of all')")
    assert outcome.status == 1, outcome.describe()
    assert outcome.text.count("Traceback") == 1, outcome.describe()
    assert "rank 0 on" in outcome.stderr


def test_an_error_of_the_last_rank_is_told_by_it(tmp_path: Path) -> None:
    body = "if rank == 2:\n    raise RuntimeError('of one')\nhpcsync.barrier()"
    outcome = run(tmp_path, body, ranks=3)
    assert outcome.status == 1, outcome.describe()
    assert outcome.text.count("Traceback") == 1, outcome.describe()
    assert "rank 2 on" in outcome.stderr


def test_all_that_a_script_may_call(tmp_path: Path) -> None:
    body = """
    def hook(*told):
        pass

    hpcsync.shutdown()
    sys.excepthook, exit_before = hook, sys.exit
    hpcsync.init()
    assert sys.excepthook is not hook
    assert (hpcsync.size(), hpcsync.local_size(), hpcsync.cross_size()) == (2, 2, 1)
    assert (hpcsync.local_rank(), hpcsync.cross_rank()) == (rank, 0)
    mine = torch.tensor([1.0, 4.0]) * (rank + 1)
    for op, truth in (
        (hpcsync.Average, [1.5, 6.0]),
        (hpcsync.Sum, [3.0, 12.0]),
        (hpcsync.Min, [1.0, 4.0]),
        (hpcsync.Max, [2.0, 8.0]),
    ):
        assert hpcsync.allreduce(mine, op).tolist() == truth
    assert hpcsync.broadcast(mine.clone(), 1).tolist() == [2.0, 8.0]
    assert hpcsync.broadcast_object({"rank": rank}, 1) == {"rank": 1}
    assert hpcsync.allgather_object(rank) == [0, 1]
    model = torch.nn.Linear(2, 2)
    hpcsync.broadcast_parameters(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 + rank)
    hpcsync.broadcast_optimizer_state(optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 1.1
    weights = hpcsync.allgather_object(model.weight.detach())
    assert torch.equal(*weights)
    hpcsync.shutdown()
    assert sys.excepthook is hook
    assert sys.exit is exit_before
    assert "SystemExit" not in globals()
    print("done", rank)
    """
    outcome = run(tmp_path, body)
    assert outcome.status == 0, outcome.describe()
    assert outcome.stdout.count("done") == 2
    assert outcome.stderr == ""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "usage: "),
        (["--explain", "comm.bucket_mb"], 0, "comm.bucket_mb"),
        (["--explain", "comm.bucket_mbs"], 2, "hpcsync: error: "),
        (["--dry-run", "train.steps=many"], 2, "hpcsync: error: "),
    ],
)
def test_what_needs_no_mpi_is_told_once(words: list[str], status: int, said: str) -> None:
    outcome = launcher.run(2, "-m", "hpcsync.train", *words)
    outcome.assert_clean()
    assert outcome.status == status, outcome.describe()
    assert sum(line.startswith(said) for line in outcome.text.splitlines()) == 1, outcome.describe()
