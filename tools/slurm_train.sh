#!/usr/bin/env bash
# Train under Slurm. GPUS (in all, 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5)
# and SRUN_ARGS (more options of srun) come from the environment.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "Usage: $0 PARTITION JOB_NAME CONFIG [options of train.py]" >&2
    exit 2
fi
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
read -r -a MORE_ARGS <<< "${SRUN_ARGS:-}"
TOOLS=$(dirname "$0")

PYTHONPATH="$TOOLS/..:${PYTHONPATH:-}" \
    srun --partition="$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    "${MORE_ARGS[@]}" \
    "${PYTHON:-python}" -u "$TOOLS/train.py" "$CONFIG" \
    --launcher slurm "${@:4}"
