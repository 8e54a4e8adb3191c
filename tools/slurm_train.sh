#!/usr/bin/env bash
# Trains on several machines under SLURM: one torchrun on each, one process for each GPU.
#
#   sbatch --nodes 2 --gpus-per-node 4 tools/slurm_train.sh train --config vmamba_tiny_s1l8 --data /data/imagenet
#   sbatch --nodes 1 --gpus-per-node 8 tools/slurm_train.sh train-dense vmamba_tiny_s1l8_mask_rcnn_1x --amp --resume
#
# Submitted again with `--resume` (for a classifier with its folder, `--resume runs/NAME`), it goes on after the last
# epoch that was finished: the same command serves a queue that limits the time of a job.
#
#SBATCH --job-name=vmamba
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --output=slurm-%j.log

set -euo pipefail

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus_per_node=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}

# torchrun gives each process its rank; the one that SLURM gives to the task must not be taken for it.
srun --kill-on-bad-exit=1 env -u SLURM_PROCID torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$gpus_per_node" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:${MASTER_PORT:-29500}" \
    -m vmamba.cli.main "$@"
