#!/bin/bash
# Trains in a chain of jobs, for runs longer than the site's time limit, where jobs may not requeue
# themselves or long ones wait too long:
#
#     sbatch --array=1-20%1 slurm/chain.sh [DECK] [key=value ...]
#
# One link runs at a time (%1), saves before its time limit, and the next one goes on to the same
# bits. When the run is done, or an error would only come again (status 1 or 2), the links that are
# left are taken out of the queue; after a lost node, a hard time limit or a preemption the next one
# goes on from the newest checkpoint. All of them write to one log. run.name and train.threads are
# set here unless you give them. `scancel ARRAY_JOB` ends all links.
#
# Exit status of a link: 0 the run is done, or saved for the next link; 75 saved, but this was the
# last link; others as in train.sh.

#SBATCH --job-name=hpcsync
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --array=1-10%1
#SBATCH --output=%x-%A.log

# Edit these three lines for your site, as in train.sh.
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

[[ -n ${SLURM_ARRAY_JOB_ID:-} ]] || die "this is no array of jobs: submit the script by" \
    "\`sbatch --array=1-20%1 slurm/chain.sh ...\`"
together=$(squeue --noheader --array --states=RUNNING --jobs="$SLURM_ARRAY_JOB_ID" 2>/dev/null | wc -l)
# shellcheck disable=SC2153 # Slurm sets it
((together <= 1)) || die "$together links of this chain run at once, and would train into one" \
    "folder: add %1, as in --array=$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX%1"
prepare "$environment"
train_command "$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID" "$@"
say "link $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_MAX"
supervise "${command[@]}"
status=$?
if ((status == 75 && SLURM_ARRAY_TASK_ID < SLURM_ARRAY_TASK_MAX)); then
    say "saved; the next link goes on from there"
    exit 0
elif ((status == 75)); then
    say "saved, but this was the last link: submit the same again with run.name=$name"
elif ((status <= 2)) && [[ -z $told_to_end ]]; then
    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
fi
exit "$status"
