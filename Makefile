# Everything runs from .venv in the checkout; `make setup` makes it, from a bare Debian machine.

PYTHON ?= /usr/bin/python3
VENV := .venv
TMEMFS := $(VENV)/bin/tmemfs
LINK ?= /usr/local/bin/tmemfs
PYTEST := $(VENV)/bin/python -m pytest

.PHONY: setup up down demo fmt lint test test-system test-vm soak kills check bench corpus docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml tools/setup.sh tmemfs/store/compiled.pyx tmemfs/store/constants.pxi
	PYTHON=$(PYTHON) tools/setup.sh $(VENV)
	touch $@

# On PATH, so that what `up` prints works. A program of that name that is there already is left alone.
up: setup
	@[ -e $(LINK) ] || [ ! -w $(dir $(LINK)) ] || ln -sf "$(CURDIR)/$(TMEMFS)" $(LINK)
	$(TMEMFS) up $(ARGS)

# Also where the virtual environment is gone: `down` needs the standard library only.
down:
	@if $(TMEMFS) --version >/dev/null 2>&1; then $(TMEMFS) down $(ARGS); else $(PYTHON) -m tmemfs down $(ARGS); fi
	@[ "$$(readlink $(LINK))" != "$(CURDIR)/$(TMEMFS)" ] || rm $(LINK)

# Neither root nor FUSE: without `make setup` only what the store itself imports is installed.
demo:
	@test -x $(TMEMFS) || PYTHON=$(PYTHON) tools/setup.sh --store-only $(VENV)
	$(VENV)/bin/python -m tmemfs demo $(ARGS)

fmt: setup
	$(VENV)/bin/ruff format tmemfs tools tests
	$(VENV)/bin/ruff check --fix tmemfs tools tests

lint: setup
	$(VENV)/bin/ruff format --check tmemfs tools tests
	$(VENV)/bin/ruff check tmemfs tools tests
	$(VENV)/bin/mypy

test: setup
	$(PYTEST) $(ARGS)

test-system: setup
	$(PYTEST) tests/fuse tests/system $(ARGS)

# A 512 MiB machine whose only swap is tmemfs, emulated: ARGS=--full runs all of it, which takes an hour and more.
test-vm: setup
	tools/setup.sh --vm $(VENV)
	$(VENV)/bin/python -m tools.vm $(ARGS)

# Two swaps, hogs that verify every byte, and everything else at once: ARGS="--minutes 20 --seed 1".
soak: setup
	$(VENV)/bin/python -m tools.soak $(ARGS)

# Workers killed again and again under load, every byte verified, every stall measured: ARGS="--kills 200 --seed 1".
kills: setup
	$(VENV)/bin/python -m tools.kills $(ARGS)

check: lint test

# The figures of docs/benchmarks.md.
bench: setup
	tools/setup.sh --bench $(VENV)
	$(VENV)/bin/python -m tools.bench $(ARGS)
	$(VENV)/bin/python -m tools.bench.peers $(ARGS)
	$(VENV)/bin/python -m tools.bench.summary
	$(if $(findstring --quick,$(ARGS)),,$(VENV)/bin/python -m tools.bench.growth)
	$(if $(findstring --quick,$(ARGS)),,$(VENV)/bin/python -m tools.bench.anatomy)

# Memory of real programs, captured into build/corpus, and how it compresses (root).
corpus: setup
	PYTHON=$(PYTHON) tools/setup.sh --corpus $(VENV)
	$(VENV)/bin/python -m tools.corpus $(ARGS)

docs: setup
	$(VENV)/bin/python -m tools.control_document > docs/control.md

clean:
	@$(PYTHON) tools/in_use.py .
	rm -rf $(VENV) build *.egg-info tmemfs/store/compiled.c tmemfs/store/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
