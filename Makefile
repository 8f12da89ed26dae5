# make demo    an image, from a fresh clone, without PyTorch
# make check   lint, types and fast tests: a minute and a half
# make test    lint, types and all tests but those of whole systems (installs everything into .venv first)
# make test-system       tests with a browser, a database, load or foreign clients, and the site of the docs
# make setup   the same environment, for working on fewstep
# make docs    the documentation as a site, in build/docs
# make test-executorch   the tests that need ExecuTorch, which has an environment of its own (minutes)

PYTHON ?= python3
PROMPT ?= a red apple, 3D style
PIP = -m pip -qq --disable-pip-version-check
INSTALL = install --constraint constraints.txt

.PHONY: demo check test test-system test-executorch setup lint types docs clean

demo: .venv-demo/ready
	@.venv-demo/bin/fewstep generate "$(PROMPT)" -o demo.png
	@du -sk .venv-demo | awk '{printf "base environment: %d MB\n", $$1 * 1.024 / 1000 + 0.5}'
	@echo "image: demo.png"

.venv-demo/ready: pyproject.toml constraints.txt $(shell find src/fewstep -type f -not -name '*.pyc')
	@$(PYTHON) -m venv --clear --without-pip .venv-demo
	@$(PYTHON) $(PIP) --python .venv-demo/bin/python $(INSTALL) .
	@touch $@

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) $(INSTALL) torch
	@.venv/bin/python $(PIP) $(INSTALL) --editable '.[dev]'
	@touch $@

lint: setup
	.venv/bin/ruff check .

types: setup
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright --pythonpath .venv/bin/python

PYTEST = .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: lint types
	$(PYTEST) -m "not slow and not system and not gpu and not data and not executorch"

test: lint types
	$(PYTEST) -m "not system and not gpu and not data and not executorch"

test-system: setup
	$(PYTEST) -m "system and not gpu"

docs: setup
	.venv/bin/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs

.venv-executorch/ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv-executorch
	@.venv-executorch/bin/python $(PIP) $(INSTALL) torch
	@.venv-executorch/bin/python $(PIP) $(INSTALL) --editable '.[export,executorch]' pytest
	@touch $@

test-executorch: .venv-executorch/ready
	.venv-executorch/bin/python -m pytest -m executorch tests/export/test_executorch.py

clean:
	rm -rf .venv .venv-demo .venv-executorch demo.png
