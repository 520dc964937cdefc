#!/usr/bin/env bash
# What a batch script does after srun, and before it says how the job ends. Nothing here may fail, or take long: the
# time limit may be near.

# Remove the compilers' caches of this job from all nodes.
timeout --kill-after=5 30 srun --mpi=none --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  --ntasks-per-node=1 rm -rf "$SCATTERGEN_NODE_CACHE" || true
