#!/bin/bash
# Measures the nodes and links of a job, names slow ones, and saves what links cost:
#
#     sbatch --nodes=16 slurm/preflight.sh [options of python -m hpcsync.preflight]
#
# Its last lines have the --exclude= that leaves slow nodes out of the next sbatch.

#SBATCH --job-name=hpcsync-preflight
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.log

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

prepare "$environment"
supervise "${python[@]}" -m hpcsync.preflight "$@"
