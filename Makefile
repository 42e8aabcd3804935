# Two commands on a fresh machine: `make demo` writes an image, `make test` runs the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

# Without an NVIDIA GPU the CPU build is asked for by its local version "+cpu", which no CUDA build can
# satisfy, so pip can never pull several GB of CUDA. --no-deps keeps the extra index to this one package.
ifeq ($(shell command -v nvidia-smi),)
TORCH := --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
else
TORCH := torch==2.13.0
endif

.PHONY: demo test sanitize lint clean

demo: $(VENV)/.installed
	$(BIN)/lumina-rt generate "a red circle left of a blue star" --output demo.png --force

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q

# The op tests on a build of csrc/ that watches every access and every undefined operation. What comes behind the flags
# of setup.py holds: at -O1 the build takes 40 s in place of 3 minutes.
sanitize: private export CC = sh -c 'exec g++ "$$@" -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all' --
sanitize: private export CXX = $(CC)
sanitize: $(VENV)/.installed-test
	rm -rf build/sanitize
	$(BIN)/pip install -q --no-deps --target build/sanitize .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitize $(BIN)/pytest -q --capture=no tests/test_cpu.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info lumina_rt/_C*.so demo.png
