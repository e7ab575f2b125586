# `make demo` and `make test` do everything on a fresh machine; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := build/uv/bin/uv
DEMO_STORE := build/demo.store
TORCH := 2.13.0# the release that the figures in docs come from

# As many processes as there are cores, four at most: each holds torch. One that has run its tests takes another's.
TESTS := pytest -n auto --maxprocesses 4 --dist worksteal

# Bytecode is written, whatever the shell says: without it each process of the tests compiles torch anew, for 4 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-ray test-loaded test-latest test-oldest heads ranker spans lint crash asan constraints clean

# $(call environment,FOLDER,CONSTRAINTS,EXTRAS): this checkout in a virtual environment, with packages of the versions in
# a file. Bytecode is left to the first import: of thousands of modules few are ever imported.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --no-compile --constraint $(2) --upgrade pip
	$(1)/bin/pip install --quiet --no-compile --constraint $(2) scikit-build-core cmake ninja
	$(1)/bin/pip install --quiet --no-compile --constraint $(2) --no-build-isolation --editable '.$(3)'
endef
BUILT_FROM := constraints.txt pyproject.toml kernels/CMakeLists.txt $(wildcard kernels/csrc/*)

$(VENV)/installed: $(BUILT_FROM)
	$(call environment,$(VENV),constraints.txt)
	touch $@

$(VENV)/installed-dev: $(BUILT_FROM)
	$(call environment,$(VENV),constraints.txt,[dev])
	touch $(VENV)/installed $@

$(VENV)/installed-ray: $(VENV)/installed-dev
	$(call environment,$(VENV),constraints.txt,[ray])
	touch $@

demo: $(VENV)/installed
	$(BIN)/rwkv-stream ingest samples/story.txt --store $(DEMO_STORE) --snapshot-every 4096
	$(BIN)/rwkv-stream snapshots list --store $(DEMO_STORE)
	$(BIN)/rwkv-stream ask --questions samples/demo-questions.txt --from-snapshot story.txt --store $(DEMO_STORE)
	$(BIN)/rwkv-stream generate --from-snapshot story.txt@50% --max-tokens 60 --seed 1 --store $(DEMO_STORE)

test: $(VENV)/installed-dev
	$(BIN)/$(TESTS)

# The tests of the Ray engine, which `make test` skips where the extra `ray` is not installed.
test-ray: $(VENV)/installed-ray
	$(BIN)/pytest tests/tables/test_ray.py tests/tables/test_row_equality.py

# The suite three times, with a busy loop beside it for each core: no test may hang on how fast the machine is.
test-loaded: $(VENV)/installed-dev
	trap 'kill $$loops 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	for core in $$(seq $$(nproc)); do (while :; do :; done) & loops="$$loops $$!"; done; \
	for run in 1 2 3; do $(BIN)/$(TESTS) || exit 1; done

# The suite with the newest of everything, and with the lower bounds of pyproject.toml, by any PYTHON.
test-latest: RESOLUTION := highest
test-oldest: RESOLUTION := lowest-direct
test-latest test-oldest: test-%: $(UV)
	$(UV) pip compile --quiet --upgrade --resolution $(RESOLUTION) --python $(PYTHON) --no-python-downloads \
	  --extra dev --output-file build/constraints-$*.txt pyproject.toml
	$(call environment,build/$*,build/constraints-$*.txt,[dev])
	build/$*/bin/$(TESTS)

# The heads of the package's model, or of MODEL, from the training data in the folder CORPUS.
heads: $(VENV)/installed-dev
	$(BIN)/python recipes/heads.py $(CORPUS) $(if $(MODEL),--model $(MODEL))

# The ranker of evidence, from the training data in the folder CORPUS; wants the package lightgbm in .venv.
ranker: $(VENV)/installed-dev
	$(BIN)/python recipes/ranker.py $(CORPUS)

# The network that finds short answers, after the ranker.
spans: $(VENV)/installed-dev
	$(BIN)/python recipes/spans.py $(CORPUS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

crash: $(VENV)/installed-dev
	$(BIN)/pytest tests/crash --all-moments

# The C++ kernels under the address sanitizer.
asan: $(VENV)/installed-dev
	mkdir -p build/asan
	$(CXX) -std=c++17 -O1 -g -fopenmp -fsanitize=address -fno-omit-frame-pointer -shared -fPIC kernels/csrc/*.cpp \
	  -o build/asan/librwkv_stream_cpu.so
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 RWKV_STREAM_TEST_KERNELS=$(CURDIR)/build/asan \
	  $(BIN)/pytest -p no:faulthandler tests/kernels/test_ops.py tests/kernels/test_kernels.py tests/kernels/test_recurrences.py tests/kernels/test_autograd.py

# The newest versions that go together on every Python that is supported.
constraints: $(UV)
	printf "torch==$(TORCH)\npip\n" | $(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --no-python-downloads \
	  --extra dev --extra ray --no-annotate --custom-compile-command "make constraints" --output-file constraints.txt \
	  pyproject.toml -
	sed -i '/^triton==/d' constraints.txt  # each build of torch wants one of its own, or none

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv

clean:
	rm -rf $(VENV) build dist
