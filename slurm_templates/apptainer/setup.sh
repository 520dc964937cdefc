#!/usr/bin/env bash
# What a batch script does before srun. These lines become part of it: copy the folder, and change what your site needs.

# The image, a file that all nodes see. In it: scattergen, and MPICH (scattergen[mpi] brings it).
export SCATTERGEN_IMAGE="${SCATTERGEN_IMAGE:-$HOME/scattergen.sif}"

# Folders that the container sees as the nodes do, besides your home: those of runs, corpus and models. By default that
# in which sbatch was called; a folder that is not there ends the job.
export APPTAINER_BIND="${APPTAINER_BIND:-$SLURM_SUBMIT_DIR}"    # with commas between: /scratch,/project/shared

# The container's own packages, not those of ~/.local.
export PYTHONNOUSERSITE=1

# The site's modules.
# module load apptainer

# The container has no squeue to ask when the time limit ends the job, and older Slurms set no variable for it.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  end=$(SLURM_TIME_FORMAT=%s timeout 15 squeue --noheader --format=%e \
    --jobs="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}")
  case "$end" in
    "" | *[!0-9]*) ;;    # squeue does not answer, or there is no time limit
    *) export SLURM_JOB_END_TIME="$end" ;;
  esac
fi

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
