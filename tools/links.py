"""Links of a virtual cluster that change their rate while a job runs on them.

Ranks are inside their nodes and cannot shape the links; who made the cluster can. A folder that
both see lies between them:

    rank 0   writes "TICKET 200mbit" to FOLDER/wanted and waits for the answer
    owner    shapes every link, then writes "TICKET ok" or "TICKET ERROR" to FOLDER/answer
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.virtual_cluster import VirtualCluster

# Seconds between looks at the folder: rare enough to take nothing from the ranks.
_LOOK_S = 0.05


def rates(text: str) -> list[str]:
    """The rates of "1gbit,200mbit,none". Raises BenchmarkError."""
    from tools.benchmark import BenchmarkError, parse_rate

    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise BenchmarkError("--links: no rate in it; write it like 1gbit,200mbit,none")
    for rate in found:
        parse_rate(rate)
    return found


@contextmanager
def served(cluster: VirtualCluster) -> Iterator[Path]:
    """Shape the cluster's links as a job wants them; the folder to hand to the job."""
    with tempfile.TemporaryDirectory(prefix="hpcsync-links-") as name:
        folder, over = Path(name), threading.Event()
        server = threading.Thread(target=_serve, args=(cluster, folder, over), daemon=True)
        server.start()
        try:
            yield folder
        finally:
            over.set()
            server.join()


def _serve(cluster: VirtualCluster, folder: Path, over: threading.Event) -> None:
    from tools.namespaces import ClusterError

    done = ""
    while not over.wait(_LOOK_S):
        ticket, _, rate = _read(folder / "wanted").partition(" ")
        if ticket == done:
            continue
        done, answer = ticket, "ok"
        try:
            cluster.set_rate(rate)
        except (ClusterError, OSError) as error:
            answer = str(error)
        _write(folder / "answer", f"{ticket} {answer}")


class Links:
    """The links as the ranks of a job see them."""

    def __init__(self, runtime: Any, folder: str) -> None:
        self._runtime, self._folder = runtime, Path(folder)

    def shape(self, rate: str) -> None:
        """Set all links to `rate` each way; collective. Raises BenchmarkError on all ranks."""
        from tools.benchmark import BenchmarkError

        self._runtime.barrier()  # nothing of before is on the way any more
        answer = self._ask(rate) if self._runtime.rank == 0 else ""
        answer = self._runtime.bcast(answer)
        if answer != "ok":
            raise BenchmarkError(f"links of {rate}: {answer}")

    def _ask(self, rate: str) -> str:
        ticket = secrets.token_hex(8)  # another job may have asked before
        _write(self._folder / "wanted", f"{ticket} {rate}")
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            found, _, answer = _read(self._folder / "answer").partition(" ")
            if found == ticket:
                return answer
            time.sleep(_LOOK_S / 5)
        return "the cluster's owner does not answer"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    """Aside and renamed, so that nobody reads a half."""
    aside = path.with_suffix(".new")
    aside.write_text(text)
    aside.rename(path)
