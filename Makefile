# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-avx2 test-versions lint clean

demo: $(VENV)/.demo
	$(BIN)/sage-music continue src/sage_studio/examples/ode_to_joy.mid --prompt-bars 4 --bars 16 \
		--out out/continuation.mid --wav --png

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# The same on a processor without AVX-512, or as if: PyTorch's own kernels, oneDNN's and (tests/conftest.py) compiled ones.
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: test

# The tests that depend on versions, with the oldest and the newest that pyproject.toml admits (some GB, an hour).
test-versions: $(VENV)/.dev
	$(BIN)/python tests/versions/run.py --write docs/versions.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml weights/pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[audio,plot]' -e ./weights
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml weights/pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]' -e ./weights
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) out build src/*.egg-info weights/build weights/src/*.egg-info
