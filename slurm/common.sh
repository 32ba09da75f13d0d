# shellcheck shell=bash
# What the scripts of this folder share; they source it inside a Slurm job.
#
#     prepare "$environment"         environment, MPI library, ranks, launcher
#     supervise COMMAND...           run COMMAND on all ranks, answer signals; its exit status
#
# Variables that say what is not to be found out (export them before sbatch):
#
#     HPCSYNC_ENVIRONMENT      commands in place of the script's line, for all scripts
#     HPCSYNC_PYTHON           python
#     HPCSYNC_CONTAINER        image that all ranks run in (hpcsync.def)
#     HPCSYNC_SITE             openmpi, mpich, cray, or a file like those in sites/
#     HPCSYNC_LAUNCHER         srun or mpirun
#     HPCSYNC_MPI              srun's --mpi=, one of `srun --mpi=list`
#     HPCSYNC_RANK             socket or core: what a rank gets on nodes without GPUs
#     HPCSYNC_SRUN_ARGS        further options of srun
#     HPCSYNC_MPIRUN_ARGS      further options of mpirun
#     HPCSYNC_SLURM            this folder, if it cannot be found

say() { echo "hpcsync: $*" >&2; }

die() {
    say "error: $*"
    exit 2
}

# Where this file is, and what sites/*.env set.
: "${here:?}" "${mpi_plugins=}" "${mpi=}"

# Sets: nodes ranks per_node cpus threads python mpi launcher, and how in words.
prepare() {
    check_job
    load_environment "${HPCSYNC_ENVIRONMENT:-$1}"
    lay_out
    find_python
    find_site
    # Or the ranks get nothing of all this where sbatch was told --export=NONE.
    export SLURM_EXPORT_ENV=ALL
    choose_launcher
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
    say "$ranks ranks on $nodes nodes, CPUs each: $cpus, by $how ($mpi)"
}

# What can be told before anything is tried.
check_job() {
    [[ -n ${SLURM_JOB_ID:-} ]] || die "this is no Slurm job: submit the script by sbatch; without" \
        "Slurm start \`mpirun -n RANKS python -m hpcsync.train ...\`"
    ((${SLURM_HET_SIZE:-1} == 1)) || die "a heterogeneous job has $SLURM_HET_SIZE parts, and only" \
        "the first would be used: submit it without ':'"
    [[ ${HPCSYNC_LAUNCHER:-srun} == @(srun|mpirun) ]] ||
        die "HPCSYNC_LAUNCHER=$HPCSYNC_LAUNCHER: must be srun or mpirun"
}

load_environment() {
    local file
    # Batch shells are no login shells, in which alone some sites define `module`,
    if [[ $1 =~ (^|[^[:alnum:]_])(module|ml)[[:space:]] ]] && ! declare -F module >/dev/null; then
        for file in /etc/profile.d/{lmod,z00_lmod,modules}.sh "${MODULESHOME:-}/init/bash"; do
            # shellcheck source=/dev/null
            [[ -r $file ]] && source "$file" && break
        done
    fi
    # nor interactive ones, to which `conda init` gives `conda activate`.
    # shellcheck disable=SC2317  # it is the line that calls it
    declare -F conda >/dev/null || conda() { with_conda "$@"; }
    eval "$1" || die "the environment line failed: $1"
}

# The first call of conda: finds it, makes its function, and calls that.
with_conda() {
    local program
    unset -f conda
    program=$(type -P conda || echo "${CONDA_EXE:-}")
    if [[ -z $program ]]; then
        say "conda is not found: load its module first, or source its etc/profile.d/conda.sh"
        return 127
    fi
    eval "$("$program" shell.bash hook)"
    conda "$@"
}

# One rank a GPU; else as many as sbatch was told; else one a socket or core.
lay_out() {
    local on_node=${SLURM_CPUS_ON_NODE:-$(nproc)} per_core cores sockets total
    nodes=${SLURM_JOB_NUM_NODES:-1}
    per_core=$(lscpu -p=CPU | grep -vc '^#')
    cores=$(lscpu -p=Core,Socket | grep -v '^#' | sort -u | wc -l)
    sockets=$(lscpu -p=Socket | grep -v '^#' | sort -u | wc -l)
    per_core=$((cores && per_core > cores ? per_core / cores : 1))
    # What Slurm calls a CPU may be a core with all its threads.
    total=$(scontrol show node "${SLURMD_NODENAME:-}" 2>/dev/null |
        sed -n '/CPUTot=/{s/.*CPUTot=\([0-9]*\).*/\1/p;q}')
    if ((cores && ${total:-cores + 1} <= cores)) || [[ ${SLURM_HINT:-} == nomultithread ||
        ${SLURM_THREADS_PER_CORE:-} == 1 ]]; then
        per_core=1
        on_node=$((cores && on_node > cores ? cores : on_node))
    fi
    spread=1 # the same number of ranks on each node, and Slurm is told so
    per_node=${SLURM_NTASKS_PER_NODE:-}
    per_node=${per_node%%(*}
    # With --ntasks, too, it is the most that a node gets.
    if [[ $per_node =~ ^[1-9][0-9]*$ ]] && ((${SLURM_NTASKS:-0} % per_node == 0)); then
        ranks=$((nodes * per_node))
    elif [[ -n ${SLURM_NTASKS:-} ]]; then
        ranks=$SLURM_NTASKS spread=
        per_node=$(((ranks + nodes - 1) / nodes))
    else
        if [[ ${SLURM_GPUS_ON_NODE:-0} -gt 0 ]]; then
            per_node=$SLURM_GPUS_ON_NODE
        elif [[ ${HPCSYNC_RANK:-socket} == core ]]; then
            per_node=$((on_node / per_core))
        elif [[ ${HPCSYNC_RANK:-socket} == socket ]]; then
            per_node=$sockets
        else
            die "HPCSYNC_RANK=$HPCSYNC_RANK: must be socket or core"
        fi
        per_node=$((per_node > on_node ? on_node : per_node > 0 ? per_node : 1))
        ranks=$((nodes * per_node))
    fi
    cpus=${SLURM_CPUS_PER_TASK:-$((on_node / per_node / per_core * per_core))}
    cpus=$((cpus > 0 ? cpus : 1))
    threads=$((cpus > per_core ? cpus / per_core : 1))
}

find_python() {
    if [[ -n ${HPCSYNC_CONTAINER:-} ]]; then
        [[ -e $HPCSYNC_CONTAINER ]] || die "HPCSYNC_CONTAINER: $HPCSYNC_CONTAINER is missing"
        apptainer=$(command -v apptainer || command -v singularity) ||
            die "HPCSYNC_CONTAINER: neither apptainer nor singularity is found; load its module" \
                "in line 3 of the script"
        python=("${apptainer##*/}" exec "$HPCSYNC_CONTAINER" python)
    else
        python=("${HPCSYNC_PYTHON:-python}")
        # A checkout need not be installed.
        [[ -f $here/../hpcsync/__init__.py ]] && export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}
    fi
    "${python[@]}" -c 'import hpcsync, mpi4py, torch' 2>"$scratch/python" ||
        die "${python[*]} cannot import hpcsync and what it needs ($(tail -n 1 "$scratch/python"));" \
            "put what your site needs into line 3 of the script, such as" \
            "environment='module load openmpi && source ~/hpcsync/.venv/bin/activate'"
}

# The settings of the MPI library that mpi4py loads.
find_site() {
    local site=${HPCSYNC_SITE:-}
    mpi=$("${python[@]}" -c 'import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().strip("\0").split(",")[0].splitlines()[0])' 2>"$scratch/mpi") ||
        die "mpi4py finds no MPI library ($(tail -n 1 "$scratch/mpi")); load your site's MPI in" \
            "line 3 of the script, or pip install 'hpcsync[mpi]'"
    if [[ -z $site ]]; then
        case $mpi in
            "Open MPI"*) site=openmpi ;;
            *CRAY*) site=cray ;;
            *) site=mpich ;;
        esac
    fi
    [[ $site == */* ]] || site=$here/sites/$site.env
    [[ -r $site ]] || die "HPCSYNC_SITE: $site cannot be read"
    # shellcheck source=/dev/null
    source "$site"
}

# By srun with a plug-in that the site has, else by mpirun. Two ranks must find each other: what is
# listed may still not fit the MPI library, and N jobs of one rank would train.
choose_launcher() {
    local listed plugin tried=() what
    listed=$(srun --mpi=list 2>&1)
    if [[ -n ${HPCSYNC_MPI:-} ]]; then
        by_srun "$HPCSYNC_MPI"
        return
    elif [[ ${HPCSYNC_LAUNCHER:-} != mpirun ]]; then
        for plugin in $mpi_plugins; do
            grep -qw -- "$plugin" <<<"$listed" || continue
            by_srun "$plugin"
            meet && return
            tried+=("$how ($(telling))")
        done
    fi
    if [[ ${HPCSYNC_LAUNCHER:-} != srun ]] && command -v mpirun >/dev/null; then
        by_mpirun
        meet && return
        tried+=("mpirun ($(telling))")
    fi
    ((${#tried[@]})) || tried=("srun (no plug-in fits)")
    what=$(printf ', %s' "${tried[@]}")
    die "the ranks do not find each other by ${what#, };" \
        "this site has: $(tr '\n\t' '  ' <<<"$listed"); name one by HPCSYNC_MPI, or see" \
        "\`python -m hpcsync.doctor\`"
}

by_srun() {
    how="srun --mpi=$1"
    launcher=(srun "--mpi=$1" "--nodes=$nodes" "--ntasks=$ranks")
    [[ -z $spread ]] || launcher+=("--ntasks-per-node=$per_node")
    # A rank that fails ends the others; one that ended well waits a minute for them.
    launcher+=("--cpus-per-task=$cpus" --cpu-bind=cores --kill-on-bad-exit=1 --wait=60)
    # All ranks see all GPUs of their node: their own is chosen by local rank, and the memory of
    # the others stays within reach.
    [[ ${SLURM_GPUS_ON_NODE:-0} -gt 0 ]] && launcher+=(--gpu-bind=none)
    # srun binds the ranks; Intel MPI would bind them once more.
    [[ $mpi != Intel* ]] || launcher=(env "I_MPI_PIN=${I_MPI_PIN:-0}" "${launcher[@]}")
    add_words "${HPCSYNC_SRUN_ARGS:-}"
}

by_mpirun() {
    how=mpirun
    if [[ $mpi == "Open MPI"* ]]; then
        # It takes its slots from here, and sbatch was maybe told of nodes only.
        export SLURM_TASKS_PER_NODE="$per_node(x$nodes)"
        launcher=(mpirun -n "$ranks" --map-by "ppr:$per_node:node:PE=$threads" --bind-to core)
    else
        launcher=(mpirun -n "$ranks" -ppn "$per_node" -bind-to "core:$threads")
    fi
    add_words "${HPCSYNC_MPIRUN_ARGS:-}"
}

add_words() {
    local more
    read -ra more <<<"$1"
    launcher+=("${more[@]}")
}

# Whether all ranks find each other; one rank has nobody to find.
meet() {
    ((ranks == 1)) && return
    timeout 300 "${launcher[@]}" "${python[@]}" -c '
from mpi4py import MPI
if MPI.COMM_WORLD.Get_size() != '"$ranks"':
    raise SystemExit(f"each rank is one of {MPI.COMM_WORLD.Get_size()}")' >"$scratch/meet" 2>&1 ||
        { say "ranks do not find each other by $how ($(telling))" && false; }
}

# The first two lines of a failed attempt that say why; the rest is of ranks that were ended for it.
telling() {
    local lines
    lines=$(awk '!/^srun: .*(Exited|[Tt]erminat|Killed)/ && !/^[-[:space:]]*$/ && !seen[$0]++ {
        printf "%s%s", n ? " | " : "", $0; if (++n == 2) exit }' "$scratch/meet")
    echo "${lines:-no word of why}"
}

# Runs a command on all ranks. USR1, Slurm's word that the time limit is near, becomes USR2: save
# and leave. TERM is passed on.
supervise() {
    local status interrupted
    # A signal that comes while a rank starts must not end it; it is sent again later.
    (
        trap '' USR1 USR2
        # srun gives its tasks the usual answers to signals.
        # shellcheck disable=SC2016  # for the shell of the rank
        exec "${launcher[@]}" bash -c 'trap "" USR1 USR2; exec "$@"' rank "$@"
    ) &
    child=$!
    trap 'interrupted=1; asked_to_leave' USR1
    trap 'interrupted=1 told_to_end=1; kill -TERM "$child" 2>/dev/null' TERM INT
    [[ -z $early ]] || asked_to_leave
    while :; do
        interrupted=
        wait "$child"
        status=$?
        [[ -n $interrupted ]] || break # else it was the wait that ended
    done
    child=
    # The launcher may have killed the slower ranks for the status of the first, and tell of that.
    if ((status)) && [[ -s $HPCSYNC_STATUS_FILE && $(<"$HPCSYNC_STATUS_FILE") != 0 ]]; then
        status=$(<"$HPCSYNC_STATUS_FILE")
    fi
    trap - USR1 TERM INT
    [[ -z ${teller:-} ]] || kill "$teller" 2>/dev/null
    return "$status"
}

asked_to_leave() {
    [[ -z $asked ]] || return
    asked=1 # at once: a second signal may come in the middle of this
    [[ -z $early ]] || say "the signal of the time limit came before the ranks have started: --time" \
        "must be longer than the lead of --signal (120 s) and a start"
    if [[ $own_script ]]; then
        say "the time limit is near: SIGUSR2 goes to the ranks of your script, which are to save" \
            "and exit with status 75"
    else
        say "the time limit is near: the ranks save and leave"
    fi
    (
        trap - USR1 TERM INT
        # Nor may it reach a launcher that has only just been started.
        [[ -z $early ]] || read -rt 10 <> <(:)
        while kill -USR2 "$child" 2>/dev/null; do
            read -rt 5 <> <(:) # sleeps, with no process that could be left behind
        done
    ) &
    teller=$!
}

clean_up() {
    [[ -z ${teller:-} ]] || kill "$teller" 2>/dev/null
    [[ -z ${child:-} ]] || kill -TERM "$child" 2>/dev/null
    rm -rf "$scratch"
}

# Ends the script; for a run that saved and left (75) puts the job into the queue again.
requeue_or_exit() {
    local status=$1 job=$SLURM_JOB_ID
    # The id alone of a task of an array may be that of the whole array.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if ((status == 75)); then
        # Slurm ends this script for it: what is left to do is done here.
        clean_up
        trap '' TERM
        if scontrol requeue "$job"; then
            say "saved; job $job is in the queue again and goes on from there"
        elif [[ $own_script ]]; then
            say "saved, but this site does not requeue jobs: submit the same again"
        else
            say "saved, but this site does not requeue jobs: submit the same again with" \
                "run.name=$name, or use slurm/chain.sh"
        fi
    elif ((status != 0 && status != 2 && status != 3 && status != 143)); then
        say "ended with status $status; if the ranks did not start well, see" \
            "${launcher[*]} python -m hpcsync.doctor"
    fi
    exit "$status"
}

# Sets the array `command` from the words of the user, for the run called $1.
train_command() {
    local word words=" ${*:2} "
    name=${1//[^[:alnum:]._-]/_}
    if [[ ${2:-} == *.py ]]; then # the user's own script
        own_script=1
        command=("${python[@]}" "${@:2}")
        return
    fi
    command=("${python[@]}" -m hpcsync.train "${@:2}")
    for word in "${@:2}"; do
        [[ $word == run.name=* ]] && name=${word#run.name=}
    done
    [[ $words == *" run.name="* || $words == *" --out"* ]] || command+=("run.name=\"$name\"")
    [[ $words == *" train.threads="* ]] || command+=("train.threads=$threads")
    [[ $words == *" --resume"* ]] || command+=(--resume auto)
}

# What TMPDIR names may be there on the login node only.
scratch=$(mktemp -d 2>/dev/null) || {
    export TMPDIR=/tmp
    scratch=$(mktemp -d) || die "no folder for temporary files can be made, not even in /tmp"
}
export HPCSYNC_STATUS_FILE=$scratch/status
early='' asked='' own_script=''
# shellcheck disable=SC2034 # chain.sh asks for it
told_to_end=''
trap 'early=1' USR1 # the time limit may be near before the ranks have started
trap clean_up EXIT
