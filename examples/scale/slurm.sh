#!/bin/bash
# sbatch examples/scale/slurm.sh PHOTOS DUMP: a part of the shards for each task of an array.
# Submitted again as it is, it goes on where it stopped; what is there is skipped.
#SBATCH --job-name=featcli
#SBATCH --array=0-15
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --requeue
set -u
export FEATCLI_PARTS=${FEATCLI_PARTS:-16} # of the array above: if some tasks alone are submitted again, that is refused
run() { if command -v srun > /dev/null; then srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" "$@"; else "$@"; fi; }
run featcli extract "$1" -c "${CHECKPOINT:-resnet50}" -o "$2" --part auto ${OPTIONS:-}
code=$?
[ $code -eq 3 ] && exit 0 # some images could not be read and are recorded: the part is done
exit $code
