"""The GPU kernels' builds for the host are kept from one process to the next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shim import host

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)
def test_a_second_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "from tests.shim import host; print(host.library('onebit')._name)"
    command = [sys.executable, "-c", code]
    made = []
    for _ in range(2):
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        library = Path(said.strip())
        made.append((library, library.stat().st_ino))
        assert [path.name for path in library.parent.iterdir()] == [library.name]
        assert library.parent.stat().st_mode & 0o777 == 0o700
    assert made[0] == made[1]


@pytest.mark.skipif(bool(host.MISSING), reason=host.MISSING)
def test_anything_of_a_build_changes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu").mkdir()
    source = tmp_path / "gpu" / "sums.cu"
    source.write_text("1")
    monkeypatch.setattr(host.kernels, "source_folder", lambda: tmp_path)

    def digest(text: str = "text") -> str:
        host.digest.cache_clear()
        return host.digest(text)

    digests = [digest(), digest("other text")]
    source.write_text("2")
    digests.append(digest())
    monkeypatch.setattr(host, "FLAGS", [*host.FLAGS, "-g"])
    digests.append(digest())
    assert digest() == digests[-1]
    assert len(set(digests)) == len(digests)
    host.digest.cache_clear()


def test_a_folder_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.tempfile, "tempdir", str(tmp_path))
    folder = host.cache.__wrapped__()
    assert host.cache.__wrapped__() == folder
    folder.chmod(0o777)
    assert host.cache.__wrapped__() != folder
