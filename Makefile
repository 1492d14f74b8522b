# Two commands do everything on a bare machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Only the twin, parity and tests need it; the default index of pip may bring a CUDA build of several GB. With another
# index: make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# What parity computes in float64, once more with x64 on: strict dtype promotion sees every number that is not asked to be.
FLOAT64_TESTS := $(addprefix tests/test_,$(addsuffix .py,masking logprobs kl rewards advantages losses sampling streaming \
	randomness rollout scoring))
SMOLLM2 := models/SmolLM2-135M-Instruct

.PHONY: train test test-slow lint smollm2 clean

## Set up and run the main job on the embedded model. ARGS="--run.seed 1" are overrides.
train: $(VENV)/.installed
	$(BIN)/python -m ppo_jax.train $(ARGS)

## Set up what the tests need, PyTorch included, then lint, types and tests.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest --numprocesses 2 $(FLOAT64_TESTS)

## The tests that need the real SmolLM2 weights or minutes.
test-slow: $(VENV)/.installed-test $(SMOLLM2)
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

## Fetch SmolLM2-135M-Instruct and convert it to safetensors, 540 MB.
smollm2: $(SMOLLM2)

$(SMOLLM2): | $(VENV)/.installed-demo
	$(BIN)/python -m scripts.fetch_smollm2 --out $@

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
