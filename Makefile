# `make demo` and `make test` do everything on a fresh machine; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STORE := build/demo.store

.PHONY: demo test lint crash asan clean

$(VENV)/installed: pyproject.toml constraints.txt kernels/CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet --constraint constraints.txt "scikit-build-core>=0.11" "cmake>=3.20" "ninja>=1.11"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/rwkv-stream ingest samples/story.txt --store $(DEMO_STORE) --snapshot-every 4096
	$(BIN)/rwkv-stream snapshots list --store $(DEMO_STORE)
	$(BIN)/rwkv-stream ask --questions samples/demo-questions.txt --from-snapshot story.txt --store $(DEMO_STORE)
	$(BIN)/rwkv-stream generate --from-snapshot story.txt@50% --max-tokens 60 --seed 1 --store $(DEMO_STORE)

# Each file's tests in one of as many processes as there are cores, four at most: each holds torch.
test: $(VENV)/installed-dev
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

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
	  $(BIN)/pytest -p no:faulthandler tests/kernels/test_ops.py tests/kernels/test_kernels.py tests/kernels/test_recurrences.py

clean:
	rm -rf $(VENV) build dist
