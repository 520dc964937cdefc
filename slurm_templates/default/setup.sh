#!/usr/bin/env bash
# What a batch script does before srun. These lines become part of it: copy the folder, and change what your site needs.

# The site's modules. Python needs none: it is the one that submitted, by its full path, which every node must see.
# module purge
# module load gcc cuda mpich    # mpi4py takes the MPI library that the loader finds; scattergen[mpi] brings its own
# export I_MPI_PMI_LIBRARY=/usr/lib64/libpmi2.so    # Intel MPI under srun: where the site has Slurm's PMI library

# Where the models are: on the login node `scattergen fetch` writes there, and the compute nodes read it.
# export HF_HOME=/project/shared/huggingface

# Compute nodes have no way to the hub; without this they wait for it in vain.
export HF_HUB_OFFLINE=1

# Ranks that share the cores of a node must not each start a thread for every core.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Since Slurm 22.05 srun does not take over --cpus-per-task from the job: a rank would get one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# MPICH with UCX tells the other nodes how to reach a rank in messages that are longer than what Slurm's PMI reads in one
# go, and some get lost: now and then ranks abort, or wait, at the start. With libfabric they are short.
export MPIR_CVAR_CH4_NETMOD="${MPIR_CVAR_CH4_NETMOD:-ofi}"

# GPUs in the order in which nvidia-smi counts them.
export CUDA_DEVICE_ORDER=PCI_BUS_ID

# Compilers' caches belong on the node's own disk: on a shared one ranks corrupt each other's.
SCATTERGEN_NODE_CACHE=$(mktemp --dry-run /tmp/scattergen-XXXXXXXX)    # only a name; in /tmp, or where the site has it
export SCATTERGEN_NODE_CACHE
export TRITON_CACHE_DIR="$SCATTERGEN_NODE_CACHE/triton"
export TORCHINDUCTOR_CACHE_DIR="$SCATTERGEN_NODE_CACHE/inductor"
export VLLM_CACHE_ROOT="$SCATTERGEN_NODE_CACHE/vllm"
