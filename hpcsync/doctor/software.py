"""Python, packages, torch with its device, native kernels."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import metadata

from .. import cuda_state, interpreter
from ..children import Answer, last_line
from .base import PACKAGE, Finding, System, fail, good, result, warn

# Where torch's builds for older CUDA drivers are; the oldest that torch 2.11 is built for.
_OLDER_CUDA = "https://download.pytorch.org/whl/cu126"
_UNSEEN = ("", "-1", "NoDevFiles")
# The vendor's number on the PCI bus, and the classes of devices that show pictures or compute.
_NVIDIA, _COMPUTES = "0x10de", ("0x0300", "0x0302")


def python(system: System) -> Iterator[Finding]:
    """Its version."""
    told = interpreter.complaint(system.version, system.env.get("PATH"), PACKAGE.parent)
    if told is not None:
        yield fail("python.old", *told)
    else:
        yield good("python", f"{'.'.join(map(str, system.version))}, {system.python}")


def packages(system: System) -> Iterator[Finding]:
    """Those that hpcsync needs, by version; whether they work is for other checks to say."""
    wanted = required()
    versions = {name: _version(name) for name in wanted}
    missing = [name for name, version in versions.items() if not version]
    old = [name for name, text in versions.items() if text and _numbers(text) < wanted[name]]
    if missing:
        specs = [_spec(name, wanted) for name in missing]
        yield fail("packages.missing", f"not installed: {', '.join(missing)}", system.pip(*specs))
    if old:
        told = ", ".join(f"{name} {versions[name]} (needs {_least(wanted[name])})" for name in old)
        yield fail("packages.old", f"too old: {told}", system.pip(*(_spec(n, wanted) for n in old)))
    if not missing and not old:
        yield good("packages", ", ".join(f"{name} {text}" for name, text in versions.items()))


def required() -> dict[str, tuple[int, ...]]:
    """Packages that hpcsync needs, with the lowest version of each."""
    project = PACKAGE.parent / "pyproject.toml"
    try:
        needs = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    except (OSError, ValueError, KeyError):
        needs = metadata.requires("hpcsync") or []
    found = {}
    for need in needs:
        match = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", need)
        if match and "extra ==" not in need:
            found[match[1]] = _numbers(match[2])
    return found


def absent(system: System, text: str) -> str:
    """The command that installs the package that Python says it lacks; empty if it says no such."""
    match = re.search(r"No module named '?(\w+)", text)
    wanted = required()
    return system.pip(_spec(match[1], wanted)) if match and match[1] in wanted else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _least(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _spec(name: str, wanted: dict[str, tuple[int, ...]]) -> str:
    return f"{name}>={_least(wanted[name])}"


def torch(system: System) -> Iterator[Finding]:
    """It imports, and was built for the devices that are here."""
    answer = system.probe("torch_device")
    told = answer.data()
    if answer.status is None:
        name = shlex.quote(f"/tmp/{system.prefix.name}")
        yield fail(
            "torch.slow",
            f"`import torch` {answer.how()} from {system.prefix}: a slow file system, or one that "
            "many ranks read at once; copy the environment to each node",
            f"cp -aT {shlex.quote(str(system.prefix))} {name} && export PATH={name}/bin:$PATH",
        )
    elif not answer.ok:
        yield fail(
            "torch.broken",
            f"`import torch` {_verb(answer)}",
            absent(system, answer.err) or system.pip("--force-reinstall", "torch"),
        )
    else:
        found = list(_devices(system, told))
        devices = ", ".join(told["names"]) or "no GPU: computes on the CPU"
        yield from result("torch", found, f"{told['version']}; {devices}")


def _devices(system: System, told: dict[str, object]) -> Iterator[Finding]:
    gpus = gpu_count(system)
    if not gpus:
        yield from _without_driver(system)
        return
    here = "a GPU is here" if gpus == 1 else f"{gpus} GPUs are here"
    if not told["cuda"]:
        yield warn(
            "torch.cpu_build",
            f"{here}, but torch {told['version']} is a build for CPUs only",
            system.pip("--force-reinstall", "torch"),
        )
    elif not told["available"] and system.env.get("CUDA_VISIBLE_DEVICES", "0") in _UNSEEN:
        yield warn(
            "torch.hidden",
            f"{here}, but CUDA_VISIBLE_DEVICES hides them; in a Slurm job that asked for none, ask "
            "by --gpus-per-task=1 --gpu-bind=none",
            "unset CUDA_VISIBLE_DEVICES",
        )
    elif not told["available"]:
        why = str(told["complaint"]) or "torch sees none of them"
        yield warn(
            "torch.driver",
            f"{here}, but torch for CUDA {told['cuda']} cannot use them: {why}",
            system.pip("--force-reinstall", "torch", "--index-url", _OLDER_CUDA),
        )
    elif not told["cupy"]:
        major = str(told["cuda"]).partition(".")[0]
        yield warn(
            "torch.cupy",
            "CuPy is missing, which compiles the GPU kernels",
            system.pip(f"cupy-cuda{major}x"),
        )
    elif told.get("problem_of_cupy"):
        yield from _other_cupy(system, str(told["problem_of_cupy"]))
    else:
        yield from _modes(system, told.get("modes"))


def _without_driver(system: System) -> Iterator[Finding]:
    """A GPU on the bus that no driver answers for."""
    for device in sorted(system.at("/sys/bus/pci/devices").glob("*")):
        vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
        if vendor.strip() == _NVIDIA and kind.startswith(_COMPUTES):
            tool = "apt-get" if system.which("apt-get") else "dnf"
            yield warn(
                "torch.no_driver",
                f"an NVIDIA GPU is in this machine ({device.name}), but no driver is loaded: runs "
                "compute on the CPU (for the administrator)",
                f"{system.sudo}{tool} install -y nvidia-driver",
            )
            return


def _other_cupy(system: System, problem: str) -> Iterator[Finding]:
    """The problem holds its command, for the pip of any environment."""
    why, _, rest = problem.partition(": `")
    commands = [each.strip().removeprefix("pip ") for each in rest.partition("`")[0].split("&&")]
    fix = " && ".join(f"{shlex.quote(system.python)} -m pip {each}" for each in commands)
    yield warn("torch.other_cupy", why, fix if system.takes_packages else system.pip())


def _modes(system: System, modes: object) -> Iterator[Finding]:
    """Compute modes in which a GPU refuses processes."""
    for index, mode in enumerate(modes if isinstance(modes, list) else []):
        fix = f"{system.sudo}nvidia-smi -i {index} -c DEFAULT"
        if mode == cuda_state.EXCLUSIVE:
            yield warn(
                "torch.exclusive",
                f"GPU {index} is in exclusive mode: one process at a time may use it, so ranks "
                "cannot share it, and what it can do cannot be tried beside a run: gradients are "
                "staged through the host's memory, which is slower",
                fix,
            )
        elif mode == cuda_state.PROHIBITED:
            yield warn(
                "torch.prohibited",
                f"GPU {index} is in prohibited mode: nothing may compute on it",
                fix,
            )


def gpu_count(system: System) -> int:
    """NVIDIA's devices of this machine, whoever may use them."""
    devices = system.at("/dev")
    if not devices.is_dir():
        return 0
    return sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in devices.iterdir())


def _verb(answer: Answer) -> str:
    return answer.how() if (answer.status or 0) < 0 else f"fails: {last_line(answer.err)}"


def kernels(system: System) -> Iterator[Finding]:
    """Built, of this version, and able to run on this processor."""
    answer = system.probe("native")
    told = answer.data()
    missing = str(told.get("missing", ""))
    if missing:
        why, _, command = missing.partition("; install")
        run = command.partition("run: ")[2] if system.takes_packages else system.pip()
        yield warn("kernels.missing", why, _compiler(system) + run)
    elif answer.status is None:
        why = f"the native kernels: trying them {answer.how()}: they may be slow to load only"
        yield fail("kernels.slow", why, system.longer)
    elif not answer.ok or not told.get("right"):
        how = "add wrongly" if answer.ok else f"do not run here: {_verb(answer)}"
        package = ["-e", str(PACKAGE.parent)] if (PACKAGE.parent / "setup.py").is_file() else []
        command = system.pip("--no-deps", *(package or ["--force-reinstall", "hpcsync"]))
        fix = absent(system, answer.err) or _compiler(system) + command
        yield fail("kernels.broken", f"the native kernels {how}", fix)
    else:
        yield good("kernels", f"native, {told['isa']}")


def _compiler(system: System) -> str:
    """What comes first where there is no compiler."""
    if any(map(system.which, ("c++", "g++", "clang++"))):
        return ""
    return (
        f"{system.sudo}apt-get install -y g++ && "
        if system.which("apt-get")
        else "module load gcc && "
    )
