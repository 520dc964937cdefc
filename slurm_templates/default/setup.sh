#!/usr/bin/env bash
# What a batch script does before srun: source this file on the batch node, and change what your site needs.
# shellcheck disable=SC1091

# The Python environment that has scattergen; every node must see it under the same path.
if [ -n "${SCATTERGEN_VENV:-}" ]; then . "$SCATTERGEN_VENV/bin/activate"; fi

# Compute nodes have no way to the hub: models are fetched on the login node.
export HF_HUB_OFFLINE=1

# Ranks that share the cores of a node must not each start a thread for every core.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Compilers' caches belong on the node's own disk: on a shared file system ranks corrupt each other's.
export TRITON_CACHE_DIR="${TMPDIR:-/tmp}/scattergen-triton-${SLURM_JOB_ID:-0}"
export TORCHINDUCTOR_CACHE_DIR="${TMPDIR:-/tmp}/scattergen-inductor-${SLURM_JOB_ID:-0}"
