#!/bin/bash
# Two machines with eight GPUs each (accelerate_configs/2x8xa100.yaml), requeued until the run is done:
#     sbatch accelerate_configs/slurm.sh scripts/train_quantumgrav.py --dataset-path data/csets --output-dir runs/csets
# Before the time limit SLURM signals the job, every process saves a checkpoint of the same step, the job is requeued
# and continues there. The script's exit code does not tell (torchrun ends with 1 after SIGTERM): the file DONE does.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

output=$(grep -oP -- '--output-dir[ =]\K\S+' <<<"$*") || { echo "give --output-dir, so that a requeued job finds its run"; exit 2; }
[ -e "$output/DONE" ] && exit 0

gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus / 2 > 0 ? SLURM_CPUS_PER_TASK / gpus / 2 : 1))  # the default of 1 starves metrics and resizing in the main process
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150             # seconds to save before torchrun kills; its own 30 are too few
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# $SLURM_NODEID is read on each node, hence the single quotes around the command.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file accelerate_configs/2x8xa100.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$1" --machine_rank "$SLURM_NODEID" --main_process_ip "$0" \
    "${@:2}" --resume-from auto' "$head" $((SLURM_NNODES * gpus)) "$@" &
trap 'kill -TERM $!; wait $!' TERM
wait $!

[ -e "$output/DONE" ] || scontrol requeue "$SLURM_JOB_ID"
