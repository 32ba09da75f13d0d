"""The order of the modules holds, and one module alone knows the world communicator."""

from __future__ import annotations

import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_launch_names_the_world() -> None:
    """A communicator is passed, never reached for."""
    naming = set()
    for path in sorted((ROOT / "hpcsync").rglob("*.py")):
        names = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if any(token.type == tokenize.NAME and token.string == "COMM_WORLD" for token in names):
            naming.add(path.relative_to(ROOT).as_posix())
    assert naming == {"hpcsync/launch.py"}
