"""The MPI suite: tests/mpi under mpirun at several rank counts."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests import launcher

TIMEOUT_S = 900.0
# Of one test on one rank; then its stack is printed and the job ends.
TEST_TIMEOUT_S = 90


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mpi_suite(ranks: int, summarise: Callable[[str], None], mpi: None) -> None:
    outcome = launcher.run(
        ranks,
        *("-m", "pytest", "tests/mpi", "-m", "mpi", "--with-mpi", "-p", "no:cacheprovider"),
        *(f"--timeout={TEST_TIMEOUT_S}", "--color=no"),
        timeout=TIMEOUT_S,
    )
    closing = re.findall(r"^=+ (.*\bin [\d.]+s.*?) =+$", outcome.stdout, flags=re.MULTILINE)
    summarise(f"MPI suite, {ranks} ranks: {closing[-1] if closing else 'did not finish'}")
    assert outcome.status == 0, outcome.describe()
    outcome.assert_clean()
    assert closing, outcome.describe()
    assert re.search(r"\b[1-9]\d* passed", closing[-1]), outcome.describe()
