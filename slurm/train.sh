#!/bin/bash
# Trains on a Slurm cluster:
#
#     sbatch slurm/train.sh [DECK] [key=value ...]
#     sbatch --nodes=8 --time=24:00:00 slurm/train.sh cpu_cluster train.steps=5000
#     sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh my.toml
#     sbatch --nodes=2 --ntasks-per-node=4 slurm/train.sh my_script.py --its-own options
#
# One rank a GPU, or a socket on nodes without; --ntasks-per-node=N of sbatch says otherwise. All
# else is found out; common.sh lists the variables that say what is not to be.
#
# Two minutes before the time limit (--signal) the ranks save at the end of a step and leave; the
# job is put into the queue again and goes on to the same bits. So it does when a node fails. The
# two minutes must do for one step, one checkpoint and one evaluation of the held-out loss; if they
# do not: sbatch --signal=B:USR1@600.
#
# run.name and train.threads are set here unless you give them; so is --resume auto. A script of your
# own must do its part itself: on SIGUSR2 save and exit with status 75 (docs/own.md has the lines).
#
# Exit status: 0 the run is done; 75 saved, to be resumed (Slurm requeues the job); 2 an error
# that you can mend, told in one line; 3 the last checkpoint was not saved; 143 cancelled;
# anything else is a failure of the program, with its traceback in the log.

#SBATCH --job-name=hpcsync
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Edit these three lines for your site: in 1 and 2 take one # away, in 3 write what makes `python`
# the one that has hpcsync.
##SBATCH --account=my_account
##SBATCH --partition=my_partition
environment='' # 3. such as 'module load openmpi && source ~/hpcsync/.venv/bin/activate'

# A job runs a copy of this script, and Slurm knows where the original is. An array has several
# records; the words behind the script belong to the line, too.
original=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}')
original=${original%" $*"}
for here in "${HPCSYNC_SLURM:-}" "$(dirname "${BASH_SOURCE[0]}")" "${original%/*}" "$PWD/slurm"; do
    [[ -r $here/common.sh ]] && break
done
if [[ ! -r $here/common.sh ]]; then
    echo "hpcsync: error: common.sh is not found: export HPCSYNC_SLURM=/path/to/hpcsync/slurm" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source "$here/common.sh"

prepare "$environment"
train_command "$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
supervise "${command[@]}"
requeue_or_exit $?
