"""Set up a machine that has Python and nothing else, then train or test.

    python3 tools/bootstrap.py train [-n RANKS] [DECK] [key=value ...] [options of hpcsync.train]
    python3 tools/bootstrap.py test [arguments of pytest]
    python3 tools/bootstrap.py setup

Each makes the virtual environment .venv in the checkout, or reuses it while the pins, the
package's metadata, the sources of its native kernels and the compiler for them are unchanged.
Open MPI comes as a wheel; ``--system-mpi`` takes the site's MPI (in an environment of its own,
.venv-system, because mpi4py would find the wheel's first).

Only the standard library is imported here, and the file is for Python 3.6, too, which many clusters
have: where this Python is too old, a newer one on PATH is taken, or its user is told.
"""

# No `from __future__ import annotations`: Python 3.6 does not know it. Quotes do the same.

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
NEWEST = 20  # minor version that is looked for, at most
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "hpcsync-setup.json"


def say(text: str) -> None:
    """Tell the user, on stderr: stdout belongs to the command that follows."""
    print("bootstrap: " + text, file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """End with one line and exit status 2."""
    say(text)
    raise SystemExit(2)


def take_newer(argv: "list[str]") -> None:
    """Become this command under a Python that is new enough, or end where there is none."""
    old = ".".join(map(str, sys.version_info[:3]))
    # uv and pip put programs into the second place.
    places = (os.environ.get("PATH", os.defpath), os.path.expanduser("~/.local/bin"))
    right = f"import sys, venv; sys.exit(sys.version_info < {OLDEST})"
    for minor in range(OLDEST[1], NEWEST + 1):
        found = shutil.which(f"python3.{minor}", path=os.pathsep.join(places))
        if found and _quiet(found, "-c", right) is None:
            say(f"python3 is Python {old}, which is too old; taking {found}")
            os.execv(found, [found, os.path.abspath(__file__), *argv])
    needed = ".".join(map(str, OLDEST))
    fail(
        f"hpcsync needs Python {needed} or newer; this is {old}, and no newer one is on PATH: load "
        f"your site's (`module avail python`) or install one (say, python{needed} by the system's "
        "packages), and run this again"
    )


# --- the virtual environment ------------------------------------------------------------------


def _quiet(*command: str, env: "dict[str, str] | None" = None) -> "str | None":
    """Run a command; None if it succeeded, else the last of what it said."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            check=False,
        )
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    return done.stdout.decode(errors="replace").strip()[-2000:] or "exit status not 0"


def _by_venv(where: Path) -> "str | None":
    return _quiet(sys.executable, "-m", "venv", "--clear", str(where))


def _by_virtualenv(where: Path) -> "str | None":
    """Debian leaves ensurepip out of python3; virtualenv does not need it, and comes by pip.

    It is installed aside and thrown away: Debian's own Python is externally managed.
    """
    with tempfile.TemporaryDirectory() as aside:
        why = _quiet(sys.executable, "-m", "pip", "install", "--target", aside, "virtualenv")
        if why is not None:
            return why
        env = dict(os.environ, PYTHONPATH=aside)
        return _quiet(sys.executable, "-m", "virtualenv", "--clear", str(where), env=env)


def _by_apt(where: Path) -> "str | None":
    """As root on Debian or Ubuntu: install the missing python3-venv."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "not root, or no apt-get"
    say("installing Debian's python3-venv")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    package = "python{}.{}-venv".format(*sys.version_info[:2])
    install = ("apt-get", "install", "-y", "--no-install-recommends", package)
    if _quiet(*install, env=env) is not None:
        _quiet("apt-get", "update", env=env)
        why = _quiet(*install, env=env)
        if why is not None:
            return why
    return _by_venv(where)


def make_environment(where: Path) -> None:
    """Make an empty virtual environment with pip, by whatever this machine allows."""
    say(f"making the virtual environment {where}")
    for way in (_by_venv, _by_virtualenv, _by_apt):
        if way(where) is None:
            return
        shutil.rmtree(where, ignore_errors=True)
    fail(
        f"cannot make a virtual environment with {sys.executable}: it lacks venv and pip; "
        "install them (Debian, Ubuntu: sudo apt-get install python3-venv) and run this again"
    )


def usable(python: Path) -> bool:
    """Whether an environment is there, with pip and of this Python's version.

    One that was half made, or made by hand, is completed rather than wiped.
    """
    probe = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    return python.exists() and _quiet(str(python), "-c", probe) is None


def fingerprint() -> str:
    """A digest of all that decides what is installed."""
    digest = hashlib.sha256()
    native = sorted(path for path in (ROOT / "cuda").rglob("*") if path.is_file())
    names = ("constraints.txt", "pyproject.toml", "setup.py", "build_kernels.py")
    for path in (*(ROOT / name for name in names), *native):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    digest.update(f"{ROOT} {os.path.realpath(sys.executable)} {sys.version}".encode())
    # A compiler that is installed or named later builds the kernels then.
    chosen = [os.environ.get(name, "").strip() for name in ("CXX", "CC")]
    names = next(filter(None, chosen), "").split()[:1] or ["c++", "g++", "clang++"]
    digest.update(f"{chosen} {any(shutil.which(name) for name in names)}".encode())
    return digest.hexdigest()


def install(python: Path, extras: "list[str]", compile_all: bool = True) -> None:
    """Install hpcsync, editable, with ``extras``, at the pinned versions.

    Without ``compile_all`` a module is compiled to bytecode when it is first imported: of torch's
    that is a half.
    """
    wanted = f"[{','.join(extras)}]" if extras else ""
    say(f"installing hpcsync{wanted} at the versions of constraints.txt")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pins = ["-c", str(ROOT / "constraints.txt")]
    # Where no bytecode is written, every start would compile again.
    if not compile_all and not sys.dont_write_bytecode:
        pip.append("--no-compile")
    build = _build_requirements()
    if _quiet(*pip, *pins, "torch", *build) is not None:
        # The package index has no CPU build of torch: take it from torch's own.
        why = _quiet(*pip, *pins, "torch", "--no-deps", "--index-url", TORCH_CPU_INDEX)
        if why is not None:
            fail(f"cannot install torch's CPU build: {_last_line(why)}")
        why = _quiet(*pip, *pins, *build)
        if why is not None:
            fail(f"cannot install {' '.join(build)}: {_last_line(why)}")
    package = ["-e", f"{ROOT}{wanted}"]
    # With what it is built with in the environment, pip need not make another one to build it in;
    # a dependency that comes as source may want one.
    if _quiet(*pip, *pins, "--no-build-isolation", *package) is not None:
        why = _quiet(*pip, *pins, *package)
        if why is not None:
            print(why, file=sys.stderr)
            fail(f"pip could not install hpcsync: {_last_line(why)}")


def _build_requirements() -> "list[str]":
    import tomllib  # not in Pythons that are too old, which are told so first

    with (ROOT / "pyproject.toml").open("rb") as file:
        return list(tomllib.load(file)["build-system"]["requires"])


@contextlib.contextmanager
def kernels_meanwhile() -> "Iterator[None]":
    """Compile the native kernels beside what is done meanwhile, and say so where that fails.

    pip's own build of the package waits for it, and takes what it made.
    """
    build = subprocess.Popen(
        [sys.executable, str(ROOT / "build_kernels.py")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield
        told = build.communicate()[0].decode(errors="replace").strip()
        if build.returncode:
            say(
                f"the native kernels were not built: {_last_line(told or 'stopped')}; sums and "
                "codecs run in NumPy, which is slower"
            )
    finally:
        if build.poll() is None:
            # Its compilers, too.
            os.killpg(build.pid, signal.SIGTERM)
            build.wait()


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("ERROR")]
    return (errors or text.splitlines())[-1]


def prepare(where: Path, extras: "list[str]", compile_all: bool = True) -> Path:
    """Make ``where`` a working environment with ``extras``, and return its Python."""
    python = where / "bin" / "python"
    stamp = where / STAMP
    known: dict[str, object] = {}
    if stamp.is_file() and python.exists():
        known = json.loads(stamp.read_text())
    have = known.get("extras")
    have = have if isinstance(have, list) and known.get("pins") == fingerprint() else None
    if have is not None and set(extras) <= set(have):
        return python
    wanted = sorted(set(extras) | set(have or ()))
    with kernels_meanwhile():
        if not usable(python):
            make_environment(where)
        stamp.unlink(missing_ok=True)
        install(python, wanted, compile_all)
    stamp.write_text(json.dumps({"pins": fingerprint(), "extras": wanted}))
    return python


# --- mpirun -----------------------------------------------------------------------------------


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_open_mpi(mpirun: str) -> bool:
    """Whether this mpirun is Open MPI's, the one that takes the flags below."""
    version = subprocess.run([mpirun, "--version"], capture_output=True, check=False)
    return b"Open MPI" in version.stdout or b"OpenRTE" in version.stdout


def mpirun_command(mpirun: str, ranks: int) -> "list[str]":
    """``mpirun -n RANKS`` with the flags that one machine needs.

    Open MPI counts a slot a core and refuses more ranks than slots unless told otherwise; its
    blocking calls spin, which starves the other ranks of an overfull machine unless they yield;
    and it would bind a rank to one core, which the rank's communication thread must not share.
    """
    command = [mpirun, "-n", str(ranks)]
    if is_open_mpi(mpirun):
        command += ["--oversubscribe", "--bind-to", "none"]
        if ranks > cores():
            command += ["--mca", "mpi_yield_when_idle", "1"]
    return command


def mpirun_environment(environment: "dict[str, str]") -> "dict[str, str]":
    """The same environment, with a home, which Open MPI needs, and its consent to run as root."""
    environment = dict(environment)
    environment["HOME"] = environment.get("HOME") or os.path.expanduser("~")
    if os.geteuid() != 0:
        return environment
    return dict(environment, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


# --- the commands -----------------------------------------------------------------------------


def parse(argv: "list[str]") -> "tuple[argparse.Namespace, list[str]]":
    """Our own options, and everything else for the command that is started."""
    parser = argparse.ArgumentParser(
        prog="bootstrap.py",
        description="Set up this checkout, then train or test.",
        allow_abbrev=False,
    )
    parser.add_argument("--venv", type=Path, metavar="DIR", help="default: .venv in the checkout")
    parser.add_argument("--system-mpi", action="store_true", help="the site's mpirun, no wheel")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,test,setup}")
    train = commands.add_parser("train", allow_abbrev=False, add_help=False)
    train.add_argument("-n", type=int, default=2, dest="ranks")
    commands.add_parser("test", allow_abbrev=False, add_help=False)
    setup = commands.add_parser("setup", allow_abbrev=False)
    setup.add_argument("--extras", default="digits", help="default: digits")
    return parser.parse_known_args(argv)


def site_mpirun() -> str:
    """The mpirun of the site, or the end."""
    found = shutil.which("mpirun")
    if found is None:
        fail("--system-mpi: no mpirun on PATH; load the site's MPI module, or leave the flag out")
    assert found is not None
    return found


def extras_of(options: argparse.Namespace, rest: "list[str]") -> "list[str]":
    """What of the package's extras a command needs, but for MPI."""
    if options.command == "test":
        return ["digits", "test"]
    if options.command == "setup":
        return [name for name in options.extras.split(",") if name]
    # scikit-learn and SciPy are large, and only this data wants them.
    return ["digits"] if any("digits" in word for word in rest) else []


def main(argv: "list[str]") -> None:
    """Prepare the environment, then become the command."""
    if sys.version_info < OLDEST:
        take_newer(argv)
    options, rest = parse(argv)
    if options.command == "setup" and rest:
        fail(f"setup does not know {' '.join(rest)}")
    default = ROOT / (".venv-system" if options.system_mpi else ".venv")
    where = options.venv.absolute() if options.venv else default
    system = site_mpirun() if options.system_mpi else None
    wheel = [] if options.system_mpi else ["mpi"]
    extras = sorted(wheel + extras_of(options, rest))
    python = prepare(where, extras, compile_all=options.command != "train")
    environment = mpirun_environment(dict(os.environ))
    environment["VIRTUAL_ENV"] = str(where)
    environment["PATH"] = f"{where / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment.pop("PYTHONHOME", None)
    if options.command == "setup":
        say(f"ready: . {where}/bin/activate")
        return
    if options.command == "test":
        os.chdir(ROOT)
        command = [str(python), "-m", "pytest", "-n", str(min(cores(), 8)), *rest]
    else:
        mpirun = system or str(where / "bin" / "mpirun")
        command = [
            *mpirun_command(mpirun, options.ranks),
            str(python),
            "-m",
            "hpcsync.train",
            *rest,
        ]
    sys.stderr.flush()
    # Replacing this process lets signals reach the job itself.
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
