#!/usr/bin/env bash
# What a batch script does after srun, and before it says how the job ends. Nothing here may fail, or take long: the
# time limit may be near.

# Remove the compilers' caches of this job from all nodes, and what a rank that was killed left in their shared memory.
timeout --kill-after=5 30 srun --mpi=none --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  --ntasks-per-node=1 sh -c "cat $SCATTERGEN_NODE_CACHE/scattergen-rank-*/shared-memory 2>/dev/null | xargs -r rm -f;
    rm -rf $SCATTERGEN_NODE_CACHE" || true
