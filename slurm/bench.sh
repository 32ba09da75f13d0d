#!/bin/bash
# Times allreduces over the nodes of a job, each algorithm beside MPI's own:
#
#     sbatch --nodes=4 slurm/bench.sh [options of tools/bench_allreduce.py]
#     sbatch --nodes=16 slurm/bench.sh --sizes 1M,25M --only auto,ring,halving,mpi

#SBATCH --job-name=hpcsync-bench
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
bench=$here/../tools/bench_allreduce.py
[[ -r $bench ]] || die "$bench is missing: bench.sh needs a checkout of hpcsync"
supervise "${python[@]}" "$bench" "$@"
