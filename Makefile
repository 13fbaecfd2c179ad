# Every target does all of its own set-up in .venv. PYTHON chooses the interpreter, 3.11 to 3.13.
PYTHON ?= python3
OUT ?= demo_output
BIN := .venv/bin
READY := .venv/ready
PYTEST := $(BIN)/python -m pytest
# Two processes; one that is done takes over tests of the other.
WORKERS := -n 2 --dist worksteal
# Triton's interpreter is chosen when Triton is imported, and stock clients, what drives a browser and Ray have packages of
# their own, so those tests run by themselves.
APART := tests/interpreted tests/kernels/test_compile_matrix.py tests/server/clients tests/server/browser tests/server/replicas

# What `make test` has of Triton's interpreter, and the rest of it in `make check`.
KITS := tests/interpreted/test_asr.py tests/interpreted/test_adapters.py tests/interpreted/test_unmerged_adapters.py

# Tests run the CUDA kernels' source on the CPU and compile it apart; the library is built where there is a GPU for it.
export MIMO_FAST_CUDA_ARCHITECTURES ?= $(if $(shell command -v nvidia-smi),,none)

# Without it each process of each target would compile its modules and rewrite its tests' assertions again.
unexport PYTHONDONTWRITEBYTECODE

# Another Triton, in a folder of its own.
OLDEST := .venv/oldest-triton
# Pipecat and LiveKit pin other versions than this package does: an environment of their own.
CLIENTS := .venv/clients
# What drives Chromium for the tests of the server's page, and what they run inside of it.
BROWSER := .venv/browser
# Ray and what it needs, beside .venv's own packages.
RAY := .venv/ray
# Where the pins of these folders hold.
PINNED := $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -))

.PHONY: demo test check kernels aarch64 bench soak nano dist lint types unit kits slow golden interpreted compiled oldest clients alone browser pictures ray clean

# Of AUDIO, TEXT, MODEL and CODEC any may be given.
demo: $(READY)
	$(BIN)/mimo-fast demo $(AUDIO) -o $(OUT) $(if $(TEXT),--text "$(TEXT)") $(if $(MODEL),--model $(MODEL)) $(if $(CODEC),--codec $(CODEC))

# What this machine's CPU does: tables, benchmarks/results/DATE-cpu.jsonl and docs/performance.md, in ten minutes.
bench: $(READY)
	$(BIN)/python -m benchmarks suite

# Before every commit: at most six minutes on two cores.
test: lint types unit kits

# Before a merge: all that `make test` leaves out; for aarch64 where there are a compiler and an emulator. The parts run side by
# side, and what needs the machine to itself comes after them.
check: slow kernels $(if $(PINNED),clients) $(if $(and $(shell command -v aarch64-linux-gnu-g++),$(shell command -v qemu-aarch64)),aarch64)
	$(if $(PINNED),$(MAKE) alone)

# One after the other, since a browser's sound card and a cluster's start have limits of their own.
alone:
	$(MAKE) browser
	$(MAKE) ray

# The Triton kernels without a GPU.
kernels: golden interpreted compiled $(if $(filter Linux,$(shell uname)),oldest)

# The CPU kernels for aarch64, NEON and portable, against scalar references; needs the Debian packages g++-aarch64-linux-gnu and qemu-user.
aarch64: $(READY)
	$(BIN)/python tests/kernels/cpu/run_kernels.py --machine aarch64 --compiler aarch64-linux-gnu-g++ --run qemu-aarch64 neon portable

# 10,000 requests, an hour of realtime sessions and killed clients against a server of nano, and an hour of talk in a page, at
# the pace that the machine allows.
soak: $(READY) $(BROWSER)/ready
	$(BIN)/python -m benchmarks robustness --only "3 hours" -o benchmarks/results/$(shell date +%F)-robustness-soak.json
	$(BIN)/python -m benchmarks serving -o benchmarks/results/$(shell date +%F)-serving.json
	$(BIN)/python -m benchmarks page -o benchmarks/results/$(shell date +%F)-page.json

# The small pair, trained from nothing; needs the Debian packages flite, festival, festvox-kdlpc16k and espeak-ng. An interrupted run goes on.
nano: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[training]'
	$(BIN)/python -m training all --run training_output

# A source distribution and a wheel for this Python in dist/; with the CUDA kernels where nvcc is.
dist: export MIMO_FAST_CUDA_ARCHITECTURES =
dist: $(READY)
	$(BIN)/python .ci/dist.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(PYTEST) $(WORKERS) -m 'not slow' $(APART:%=--ignore=%)

# The kits of the ASR model and of adapters on the Triton path: what takes seconds.
kits: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) $(WORKERS) -m 'not slow' $(KITS)

slow: $(READY)
	$(PYTEST) $(WORKERS) -m slow $(APART:%=--ignore=%)

interpreted: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) $(WORKERS) tests/interpreted --ignore=tests/interpreted/test_model.py $(KITS:%=--ignore=%)
	TRITON_INTERPRET=1 $(PYTEST) $(WORKERS) -m slow $(KITS)

# The parity kit with every op on its Triton path, in one process: stages share what they compute.
golden: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted/test_model.py

compiled: $(READY)
	$(PYTEST) $(WORKERS) tests/kernels/test_compile_matrix.py

# The oldest Triton that is supported: every case for one architecture, and those whose tiles depend on the version for
# two where other tiles would spill.
oldest: $(OLDEST)/ready
	PYTHONPATH=$(OLDEST) $(PYTEST) $(WORKERS) tests/kernels/test_compile_matrix.py -k 'test_compiles_without_spills and (sm_90 or (sm_80 or sm_86) and (dot or prefill))'

$(OLDEST)/ready: $(READY) .ci/oldest-triton.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $(OLDEST) -r .ci/oldest-triton.txt
	touch $@

# Stock clients of the server: the openai SDK, Pipecat and LiveKit.
clients: $(CLIENTS)/ready
	$(PYTEST) tests/server/clients

$(CLIENTS)/ready: $(READY) .ci/clients.txt
	rm -rf $(CLIENTS)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile -r .ci/clients.txt
	touch $@

# The server's page in Chromium; where there is no browser or no npm one line says so.
browser: $(if $(shell command -v npm),$(BROWSER)/ready,$(READY))
	$(PYTEST) -rs tests/server/browser

# Pictures of the page in each state for docs/pictures, in some minutes; needs what `make browser` needs.
pictures: $(BROWSER)/ready
	$(BIN)/python tests/server/browser/pictures.py docs/pictures

$(BROWSER)/ready: $(READY) .ci/browser.txt tests/server/browser/package-lock.json
	rm -rf $(BROWSER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile --target $(BROWSER) -r .ci/browser.txt
	cp tests/server/browser/package*.json $(BROWSER)
	npm ci --silent --no-audit --no-fund --ignore-scripts --prefix $(BROWSER)
	touch $@

# Two replicas of nano under Ray Serve.
ray: $(RAY)/ready
	$(PYTEST) tests/server/replicas

$(RAY)/ready: $(READY) .ci/ray.txt
	rm -rf $(RAY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $(RAY) -r .ci/ray.txt
	touch $@

$(READY): pyproject.toml constraints.txt requirements.lock .ci/install setup.py $(wildcard csrc/*.py csrc/cpu/* csrc/cuda/*)
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "mimo-fast needs Python 3.11 to 3.13; this is " + sys.version.split()[0] + ". Try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.ci/install $(BIN)/python
	touch $(READY)

clean:
	rm -rf .venv $(OUT) build dist *.egg-info mimo_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
