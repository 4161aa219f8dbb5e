# `make demo` runs the main job, `make test` the tests; each makes .venv first if it is not there.
PYTHON ?= python3.11
KUZUSHIJI = .venv/bin/kuzushiji

.PHONY: demo check test lock clean
.DELETE_ON_ERROR:

# Hashes are checked for every package; the project itself comes from this folder, built by the locked setuptools.
.venv: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --require-hashes -r requirements.lock
	.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/.installed-dev: requirements-dev.lock .venv/.installed
	.venv/bin/pip install --quiet --require-hashes -r requirements-dev.lock
	touch $@
