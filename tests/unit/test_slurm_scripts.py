"""The scripts of slurm/ without a Slurm: clean shell, and what they decide."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launcher

SLURM = launcher.ROOT / "slurm"
JOBS = ("train.sh", "chain.sh", "bench.sh", "preflight.sh")
SHELL = sorted([*SLURM.glob("*.sh"), *SLURM.glob("sites/*.env")])


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    done = subprocess.run(
        ["shellcheck", "--external-sources", f"--source-path={launcher.ROOT}", str(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stdout


@pytest.mark.parametrize("name", JOBS)
def test_a_user_edits_three_lines_at_most(name: str) -> None:
    text = (SLURM / name).read_text()
    for line in ("##SBATCH --account=", "##SBATCH --partition=", "environment=''"):
        assert text.count(f"\n{line}") == 1
    # sbatch reads options up to the first command only.
    head = text[: text.index("\nenvironment=")]
    assert text.count("\n#SBATCH ") == head.count("\n#SBATCH ") > 3
    assert os.access(SLURM / name, os.X_OK)


def test_train_can_be_requeued() -> None:
    for name in ("train.sh", "chain.sh"):
        text = (SLURM / name).read_text()
        for option in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
            assert f"\n#SBATCH {option}\n" in text


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder of commands that stand for a node's: two sockets of four cores of two threads."""
    cpus = [(cpu, cpu % 8, cpu % 8 // 4) for cpu in range(16)]
    columns = {"CPU": 0, "Core,Socket": slice(1, 3), "Socket": 2}
    for wanted, column in columns.items():
        cells = [cpu[column] for cpu in cpus]
        lines = [",".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in cells]
        (tmp_path / f"lscpu-{wanted}").write_text("# a comment\n" + "\n".join(lines) + "\n")
    fake(tmp_path, "lscpu", f'cat "{tmp_path}/lscpu-${{1#-p=}}"')
    fake(tmp_path, "scontrol", "exit 1")
    return tmp_path


def fake(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def shell(fakes: Path, script: str, status: int = 0, **env: str) -> str:
    """What a script prints after it has sourced common.sh."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "HPCSYNC_"))}
    done = subprocess.run(
        ["bash", "-c", f'here={SLURM}; source "$here/common.sh"; {script}'],
        env={**clean, "PATH": f"{fakes}:{clean['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, "4 2 8 4"),  # a socket each
        ({"HPCSYNC_RANK": "core"}, "16 8 2 1"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "8 4 4 2"),
        ({"SLURM_NTASKS_PER_NODE": "1"}, "2 1 16 8"),
        ({"SLURM_NTASKS": "3"}, "3 2 8 4"),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "4"}, "4 2 4 2"),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4"}, "4 2 8 4"),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "3"}, "3 2 8 4"),
        ({"SLURM_NTASKS_PER_NODE": "4(x2)"}, "8 4 4 2"),
        ({"SLURM_NTASKS_PER_NODE": "2,1", "SLURM_NTASKS": "3"}, "3 2 8 4"),
        ({"SLURM_CPUS_ON_NODE": "1"}, "2 1 1 1"),
        ({"SLURM_GPUS_ON_NODE": "3"}, "6 3 4 2"),  # whole cores
        ({"SLURM_THREADS_PER_CORE": "1"}, "4 2 4 4"),
        ({"SLURM_HINT": "nomultithread", "SLURM_CPUS_ON_NODE": "8"}, "4 2 4 4"),
    ],
)
def test_ranks_and_their_cores(fakes: Path, env: dict[str, str], wanted: str) -> None:
    """Ranks, ranks a node, CPUs and threads a rank, on two nodes."""
    node = {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    found = shell(fakes, "lay_out; echo $ranks $per_node $cpus $threads", **{**node, **env})
    assert found.strip() == wanted


def test_a_cpu_of_slurm_may_be_a_core(fakes: Path) -> None:
    fake(fakes, "scontrol", "echo NodeName=n1; echo '   CPUAlloc=0 CPUEfctv=8 CPUTot=8 CPULoad=0'")
    node = {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8"}
    assert shell(fakes, "lay_out; echo $ranks $per_node $cpus $threads", **node) == "4 2 4 4\n"


def test_a_number_of_ranks_alone_says_nothing_of_nodes(fakes: Path) -> None:
    script = "nodes=2; mpi=x; lay_out; by_srun pmix; echo ${launcher[*]}"
    node = {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    assert "--ntasks-per-node" not in shell(fakes, script, SLURM_NTASKS="4", **node)
    assert "--ntasks-per-node=2" in shell(fakes, script, **node)


def test_intel_mpi_does_not_bind_what_srun_has_bound(fakes: Path) -> None:
    script = "mpi='Intel(R) MPI'; nodes=1 ranks=2 per_node=2 cpus=1 threads=1 spread=1; "
    by = "by_{}; echo ${{launcher[*]}}"
    assert shell(fakes, script + by.format("srun pmi2")).startswith("env I_MPI_PIN=0 srun ")
    assert "I_MPI_PIN" not in shell(fakes, script + by.format("mpirun"))


def test_ranks_get_the_environment_of_the_script(fakes: Path) -> None:
    """Also under `sbatch --export=NONE`, of which srun hears by this variable."""
    steps = "load_environment lay_out find_python find_site choose_launcher"
    script = f'for step in {steps}; do eval "$step() {{ :; }}"; done; '
    values = "ranks=1 nodes=1 cpus=1 threads=3 how=x mpi=y; "
    env = {"SLURM_EXPORT_ENV": "NONE", "SLURM_JOB_ID": "7"}
    found = shell(fakes, f"{script}{values}prepare ''; env", **env).splitlines()
    assert "SLURM_EXPORT_ENV=ALL" in found
    assert "OMP_NUM_THREADS=3" in found or "OMP_NUM_THREADS" in os.environ


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, "this is no Slurm job: submit the script by sbatch;"),
        ({"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2"}, "a heterogeneous job has 2 parts, and only"),
        (
            {"SLURM_JOB_ID": "7", "HPCSYNC_LAUNCHER": "mpiexec"},
            "HPCSYNC_LAUNCHER=mpiexec: must be srun or mpirun",
        ),
    ],
)
def test_what_is_told_before_anything_is_tried(
    fakes: Path, env: dict[str, str], wanted: str
) -> None:
    told = shell(fakes, "prepare 'echo tried'", 2, **env)
    assert told.startswith(f"hpcsync: error: {wanted}"), told
    assert "tried\n" not in told


def test_a_chain_is_an_array(fakes: Path) -> None:
    done = subprocess.run(
        ["bash", str(SLURM / "chain.sh")],
        env={"PATH": f"{fakes}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("hpcsync: error: this is no array of jobs: submit the script by")


CONDA = """
[[ $1 == shell.bash ]] || { echo "Run 'conda init' before 'conda activate'" >&2; exit 1; }
echo 'conda() { export CONDA_DEFAULT_ENV=$2; }'
"""


def test_conda_activate_works_in_a_batch_shell(fakes: Path) -> None:
    """Which reads no .bashrc, where `conda init` has put its function."""
    (fakes / "module").mkdir()
    fake(fakes / "module", "conda", CONDA)
    told = 'echo "in $CONDA_DEFAULT_ENV"'
    load = f"PATH={fakes}/module:$PATH"  # as a module does, before conda is called
    found = shell(fakes, f"load_environment '{load}; conda activate mine'; {told}")
    assert found == "in mine\n"
    found = shell(
        fakes,
        f"load_environment 'conda activate mine'; {told}",
        CONDA_EXE=str(fakes / "module" / "conda"),
    )
    assert found == "in mine\n"
    nowhere = "type() { false; }; load_environment 'conda activate mine'"
    found = shell(fakes, nowhere, 2, CONDA_EXE="")
    assert "conda is not found: load its module first" in found
    assert "the environment line failed: conda activate mine" in found


def test_ml_is_module_too(fakes: Path) -> None:
    (fakes / "init").mkdir()
    (fakes / "init" / "bash").write_text("module() { :; }; ml() { echo loaded $1; }\n")
    found = shell(fakes, "load_environment 'ml openmpi'", MODULESHOME=str(fakes))
    assert found == "loaded openmpi\n"


def test_a_folder_for_temporary_files_that_is_not_there(fakes: Path) -> None:
    told = shell(fakes, 'echo "$scratch $TMPDIR"', TMPDIR=str(fakes / "missing"))
    assert re.fullmatch(r"/tmp/\S+ /tmp\n", told)


RECORD = "JobId={0} ArrayJobId=7 ArrayTaskId={0}\n   Command={1}\n   WorkDir=/tmp\n"


@pytest.mark.parametrize("name", JOBS)
def test_the_folder_is_found_from_a_copy(fakes: Path, name: str) -> None:
    """Of an array, in a path with a space, behind words with slashes."""
    folder, spool = fakes / "a checkout" / "slurm", fakes / "spool"
    folder.mkdir(parents=True)
    spool.mkdir()
    (folder / "common.sh").write_text('echo "found $here"; exit 0\n')
    shutil.copy(SLURM / name, spool / "slurm_script")
    records = "".join(RECORD.format(job, f"{folder}/{name} my/deck.toml a.b=1") for job in (7, 8))
    (fakes / "records").write_text(records)
    fake(fakes, "scontrol", f"cat {fakes}/records")
    command = ["bash", str(spool / "slurm_script"), "my/deck.toml", "a.b=1"]
    env = {"PATH": f"{fakes}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        command, env=env, cwd=spool, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"found {folder}\n", done.stderr
    (folder / "common.sh").unlink()
    done = subprocess.run(
        command, env=env, cwd=spool, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "hpcsync: error: common.sh is not found: export HPCSYNC_SLURM=/path/to/hpcsync/slurm\n"
    )


LINK = """
here=$HPCSYNC_SLURM; source {common}
prepare() {{ python=(python) threads=1; }}
supervise() {{ told_to_end={told}; return {status}; }}
"""


def link(fakes: Path, status: int, told: str = "", running: int = 1) -> tuple[int, str]:
    """Status and words of a link of a chain whose ranks end with a status."""
    text = LINK.format(common=SLURM / "common.sh", told=told, status=status)
    (fakes / "common.sh").write_text(text)
    fake(fakes, "squeue", f"seq {running}")
    fake(fakes, "scancel", 'echo "scancel $*"')
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1"}
    env = {"SLURM_JOB_NAME": "x", "SLURM_ARRAY_TASK_MAX": "4", "HPCSYNC_SLURM": str(fakes), **array}
    done = subprocess.run(
        ["bash", str(SLURM / "chain.sh")],
        env={"PATH": f"{fakes}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


def test_what_ends_a_chain(fakes: Path) -> None:
    """The end of the run or an error that would come again; no lost node, kill or preemption."""
    for status in (0, 1, 2):
        assert link(fakes, status) == (
            status,
            "hpcsync: link 2 of 4\nscancel --state=PENDING 7\n",
        )
        assert "scancel" not in link(fakes, status, told="1")[1]
    for status in (3, 129, 137, 143, 255):
        assert link(fakes, status) == (status, "hpcsync: link 2 of 4\n")
    assert link(fakes, 75)[0] == 0


def test_a_chain_whose_links_run_at_once(fakes: Path) -> None:
    status, told = link(fakes, 0, running=2)
    assert status == 2
    assert "2 links of this chain run at once" in told
    assert "--array=1-4%1" in told


def test_what_is_requeued(fakes: Path) -> None:
    fake(fakes, "scontrol", 'echo "$*"')
    alone = shell(fakes, "requeue_or_exit 75", 75, SLURM_JOB_ID="9")
    assert alone.startswith("requeue 9\n")
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert shell(fakes, "requeue_or_exit 75", 75, **array).startswith("requeue 9_3\n")


def test_a_script_of_ones_own_is_told_what_is_asked_of_it(fakes: Path) -> None:
    (fakes / "own.py").write_text(PROGRAM)
    enter = f"cd {fakes}; launcher=(env); python=({sys.executable}); threads=1; "
    signals = "(until [[ -e ready ]]; do sleep 0.05; done; kill -USR1 $$) & "
    go = 'train_command x own.py; supervise "${command[@]}"; echo status $?'
    told = shell(fakes, enter + signals + go)
    assert "ranks of your script, which are to save and exit with status 75" in told
    assert told.endswith("status 75\n")


def test_what_is_no_kind_of_rank(fakes: Path) -> None:
    told = shell(fakes, "lay_out", 2, HPCSYNC_RANK="rack")
    assert told == "hpcsync: error: HPCSYNC_RANK=rack: must be socket or core\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", 'run.name="a_b-7" train.threads=4 --resume auto'),
        (
            "my.toml train.steps=3",
            'my.toml train.steps=3 run.name="a_b-7" train.threads=4 --resume auto',
        ),
        (
            "run.name=x train.threads=1 --resume runs/x",
            "run.name=x train.threads=1 --resume runs/x",
        ),
        ("--out there", "--out there train.threads=4 --resume auto"),
    ],
)
def test_the_words_of_the_user_count(fakes: Path, words: str, wanted: str) -> None:
    script = f'python=(python); threads=4; train_command "a/b-7" {words}; echo "${{command[*]}}"'
    assert shell(fakes, script).strip() == f"python -m hpcsync.train {wanted}".replace("  ", " ")


def test_a_script_of_ones_own_is_left_alone(fakes: Path) -> None:
    script = 'python=(python); threads=4; train_command x own.py --its; echo "${command[*]}"'
    assert shell(fakes, script).strip() == "python own.py --its"


LIBRARIES = {
    "Open MPI v5.0.11": ("openmpi", "pmix"),
    "MPICH Version:      4.2.0": ("mpich", "pmi2 pmix"),
    "Intel(R) MPI Library 2021.11": ("mpich", "pmi2 pmix"),
    "MPI VERSION    : CRAY MPICH version 8.1.28": ("cray", "cray_shasta pmi2"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_settings_of_each_mpi(fakes: Path, library: str) -> None:
    name, plugins = LIBRARIES[library]
    fake(fakes, "python", f'echo "{library}"')
    script = 'python=(python); find_site; echo "$mpi_plugins"; env'
    found = shell(fakes, script, SLURM_GPUS_ON_NODE="4").splitlines()
    assert found[0] == plugins
    text = (SLURM / "sites" / f"{name}.env").read_text()
    for variable in re.findall(r"^ *export (\w+)=\$", text, re.MULTILINE):
        if not variable.startswith("I_MPI") or library.startswith("Intel"):
            assert [line for line in found if line.startswith(f"{variable}=")], variable
    # Each setting has its reason above it.
    for block in re.split(r"\n\n", text):
        assert "export " not in block or block.lstrip().startswith(("#", "if", "fi")), block


def test_what_the_user_has_set_stays(fakes: Path) -> None:
    fake(fakes, "python", 'echo "Open MPI v5.0.11"')
    found = shell(fakes, "python=(python); find_site; env", PMIX_MCA_gds="shmem2")
    assert "PMIX_MCA_gds=shmem2" in found.splitlines()


def choose(fakes: Path, listed: str, works: str, **env: str) -> str:
    """The launcher on a site that lists plug-ins, where commands that match a pattern work."""
    fake(
        fakes,
        "srun",
        f'[[ $1 == --mpi=list ]] && echo "{listed}" && exit; [[ "srun $*" == {works} ]] || '
        "{ printf 'each rank is one of 1\\neach rank is one of 1\\nno key of %s\\nmore\\n' $1; "
        "echo 'srun: error: node1: task 0: Exited with exit code 1'; exit 1; }",
    )
    fake(fakes, "mpirun", f'[[ "mpirun $*" == {works} ]]')
    script = (
        "python=(python); nodes=2 ranks=4 per_node=2 cpus=8 threads=4 spread=1; "
        "mpi='Open MPI v5.0.11'; "
        'mpi_plugins="pmix pmi2"; choose_launcher; echo "${launcher[*]}"'
    )
    status = 2 if works == "nothing" else 0
    return shell(fakes, script, status, **env).splitlines()[-1]


def test_the_launcher_is_one_that_works(fakes: Path) -> None:
    srun = (
        "srun --mpi={} --nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=8 "
        "--cpu-bind=cores --kill-on-bad-exit=1 --wait=60"
    )
    both = "pmi2 pmix none"
    mpirun = "mpirun -n 4 --map-by ppr:2:node:PE=4 --bind-to core"
    assert choose(fakes, both, "*") == srun.format("pmix")
    assert choose(fakes, both, "*mpi=pmi2*") == srun.format("pmi2")
    assert choose(fakes, "none", "*") == mpirun
    assert choose(fakes, both, "mpirun*") == mpirun
    assert choose(fakes, both, "*", HPCSYNC_LAUNCHER="mpirun") == mpirun
    assert choose(fakes, both, "*", HPCSYNC_MPI="pmi2") == srun.format("pmi2")
    assert choose(fakes, both, "*", HPCSYNC_SRUN_ARGS="-q x") == srun.format("pmix") + " -q x"
    assert choose(fakes, both, "*", SLURM_GPUS_ON_NODE="2").endswith("--gpu-bind=none")
    told = choose(fakes, both, "nothing")
    assert "do not find each other by srun --mpi=pmix (each rank is one of 1 | no key of" in told
    assert "no key of --mpi=pmi2), mpirun (no word of why); this site has" in told
    assert "pmi2 pmix none" in told


def test_a_python_without_hpcsync(fakes: Path) -> None:
    fake(fakes, "python", "echo \"No module named 'torch'\" >&2; false")
    told = shell(fakes, "find_python", 2)
    assert "python cannot import hpcsync and what it needs (No module named 'torch')" in told
    assert "line 3" in told


def test_a_container(fakes: Path) -> None:
    image = fakes / "hpcsync.sif"
    assert "is missing" in shell(fakes, "find_python", 2, HPCSYNC_CONTAINER=str(image))
    image.touch()
    fake(fakes, "apptainer", "exit 0")
    script = 'find_python; echo "${python[*]}"'
    found = shell(fakes, script, HPCSYNC_CONTAINER=str(image))
    assert found == f"apptainer exec {image} python\n"
    (fakes / "apptainer").rename(fakes / "singularity")
    found = shell(fakes, script, HPCSYNC_CONTAINER=str(image))
    assert found == f"singularity exec {image} python\n"


def test_the_definition_of_the_container_names_what_is_there() -> None:
    text = (SLURM / "hpcsync.def").read_text()
    assert re.match(r"Bootstrap: \w+\nFrom: \S+\n", text)
    sections = re.split(r"^%(\w+)$", text, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(found) == ["files", "post", "environment", "runscript", "test"]
    for line in found["files"].split("\n"):
        if line.strip():
            source, target = line.split()
            assert (launcher.ROOT / source).exists(), source
            assert target == f"/opt/hpcsync/{source}"
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["bash", "-n"], input=found[name], text=True, check=True)


def test_the_container_has_what_the_package_is_built_from(tmp_path: Path) -> None:
    text = (SLURM / "hpcsync.def").read_text()
    for source in re.findall(r"^    (\S+) /opt/hpcsync/\S+$", text, flags=re.MULTILINE):
        path = launcher.ROOT / source
        names = [path.relative_to(launcher.ROOT)] if path.is_file() else []
        names += [name.relative_to(launcher.ROOT) for name in path.glob("__init__.py")]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(launcher.ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The public index has no CPU build of torch, which the pins name.
    assert all("download.pytorch.org" in line for line in text.split("\n") if "-c const" in line)


PROGRAM = """
import pathlib, signal, sys
heard = []
signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
pathlib.Path("ready").touch()
while not heard:
    signal.sigtimedwait([], 0.05)
sys.exit(75)
"""


def test_the_status_of_the_program_is_told_whatever_comes_between(fakes: Path) -> None:
    """USR1 becomes USR2, until the program has heard it; its status counts."""
    (fakes / "program.py").write_text(PROGRAM)
    enter = f"cd {fakes}; launcher=(env); "
    signals = "(until [[ -e ready ]]; do sleep 0.05; done; kill -USR1 $$; kill -USR1 $$) & "
    go = f"supervise {sys.executable} program.py; echo status $?"
    told = shell(fakes, enter + signals + go)
    assert told.count("the time limit is near") == 1
    assert told.endswith("status 75\n")
    # Before there is a program that could hear it.
    told = shell(fakes, f"{enter} kill -USR1 $$; {go}")
    assert told.endswith("status 75\n")
    assert "--time must be longer than the lead of --signal" in told
    assert shell(fakes, f"{enter} supervise bash -c 'exit 7'; echo status $?") == "status 7\n"


def test_term_is_passed_on(fakes: Path) -> None:
    (fakes / "program.py").write_text(PROGRAM.replace("SIGUSR2", "SIGTERM").replace("75", "143"))
    signals = "(until [[ -e ready ]]; do sleep 0.05; done; kill -TERM $$) & "
    go = f"supervise {sys.executable} program.py; echo status $? $told_to_end"
    told = shell(fakes, f"cd {fakes}; launcher=(env); {signals} {go}")
    assert told == "status 143 1\n"
