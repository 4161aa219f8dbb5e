# `make demo` runs the main job, `make test` the tests; each makes .venv first if it is not there, with the newest of the
# supported Pythons that runs (a shim of pyenv's may be there and not run), or with PYTHON=.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11; do \
  $$python -c 'import ensurepip, venv' > /dev/null 2>&1 && echo $$python && break; done)
KUZUSHIJI = .venv/bin/kuzushiji

.PHONY: demo docs check test test-long test-smoke test-cloud test-image bench recognition chaos fuzz lock clean
.DELETE_ON_ERROR:

# Hashes are checked for every package; the project itself comes from this folder, built by the locked setuptools.
.venv: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Install Python 3.11, 3.12 or 3.13 with its venv (Debian: apt install python3-venv), or name one: make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo 'Installing packages into .venv: 4 GB, some minutes without output'
	.venv/bin/pip install --quiet --require-hashes -r requirements.lock
	.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo 'Installed. To use it in this shell: export PATH="$(CURDIR)/.venv/bin:$$PATH"'

.venv/.installed-dev: requirements-dev.lock .venv/.installed $(wildcard tests/old_keras/*.lock)
	.venv/bin/pip install --quiet --require-hashes -r requirements-dev.lock
	for lock in tests/old_keras/*.lock; do \
	  .venv/bin/pip install --quiet --upgrade --no-deps --require-hashes -r $$lock \
	    --target .venv/old_keras/$$(basename $$lock .lock) || exit; done
	touch $@

# Style, then types, of our packages.
check: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# docs/cli.md, from the help of the commands.
docs: .venv/.installed
	.venv/bin/python docs/cli.py > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

# The number of test processes (pytest-xdist), for 2 cores: one more, since they often wait for other processes.
TEST_PROCESSES ?= 3
test: .venv/.installed-dev
	.venv/bin/pytest -q -n $(TEST_PROCESSES) -m 'not cloud and not long'

test-long: .venv/.installed-dev
	.venv/bin/pytest -q -m long

# As root: a cluster in a Google Cloud of one machine (tests/fake_cloud/README.md). The smoke is the main part of it.
test-smoke: .venv/.installed-dev
	.venv/bin/pytest -q -m smoke

test-cloud: .venv/.installed-dev
	.venv/bin/pytest -q -m cloud

# How fast it is compared with what people would use instead, in ratios: some 20 minutes on 2 cores, with nothing next to it.
# Writes docs/bench.md and docs/growth.png; BENCH=--quick shows in minutes that it runs.
BENCH ?= --docs docs
bench: .venv/.installed-dev
	PYTHONPATH=tests .venv/bin/python -m benchmarks $(BENCH)

# How well each recipe reads what it was not trained on: parts of some 20 minutes on 2 cores, as many as fit into half an
# hour; a later call continues. FONTS is a folder of five brush fonts, a file each (docs/recognition/README.md).
FONTS ?= fonts
recognition: .venv/.installed-dev
	PYTHONPATH=tests .venv/bin/python -m benchmarks.recognition --fonts $(FONTS)

# prepare, train and predict under random SIGKILLs: the same bytes, or exit code 1. A round has 24 to 40 kills.
ROUNDS ?= 10
SEED ?= 1
chaos: .venv/.installed-dev
	.venv/bin/python tests/chaos.py --rounds $(ROUNDS) --seed $(SEED)

# Hostile pages, archives, manifests and datasets, with a new seed, which it prints.
FUZZ_SECONDS ?= 600
fuzz: .venv/.installed-dev
	.venv/bin/python tests/fuzz.py --seconds $(FUZZ_SECONDS)

# The Dockerfile, built and run for real: root on Debian 12, 3 to 7 minutes, 1 GB of downloads.
test-image:
	tests/build_image.sh

# From drawn pages to a checked model and pages that it reads, under demo/ (which git ignores). Without augmentation, which
# helps only with more epochs.
demo: .venv/.installed
	rm -rf demo
	$(KUZUSHIJI) sample --out demo/pages --num-pages 56 --scale 0.5
	$(KUZUSHIJI) prepare --pages demo/pages/train_images --labels demo/pages/train.csv --dataset demo/dataset \
	  --val-fraction 0.1 --test-fraction 0.1
	$(KUZUSHIJI) train --dataset demo/dataset --models demo/models --architecture resnet \
	  --epochs 2 --global-batch-size 64 --augment none --run demo
	$(KUZUSHIJI) evaluate --model demo/models/resnet --dataset demo/dataset --out demo/evaluation
	$(KUZUSHIJI) pull --models demo/models --to demo/pulled
	$(KUZUSHIJI) verify demo/pulled/resnet
	$(KUZUSHIJI) sample --out demo/new --num-pages 4 --scale 0.5 --seed 7
	$(KUZUSHIJI) predict --model demo/pulled/resnet --pages demo/new/train_images --boxes demo/new/train.csv \
	  --out demo/read --format csv --annotate demo/pictures
	@echo
	@grep '^|' demo/pulled/resnet/demo/README.md
	@echo
	@echo 'Open in a browser or an image viewer:'
	@echo '  demo/pictures/*.jpeg                   new pages, and next to each what the model read (red: wrong)'
	@echo '  demo/dataset.report.html               the dataset: crops, books, characters'
	@echo '  demo/models/resnet/demo.report.html    the model: curves, errors, confused crops'
	@echo 'Tables:'
	@echo '  demo/read/                             what was read, a row a box and a row a page'
	@echo '  demo/evaluation/misclassified.csv      what the model got wrong'
	@echo 'Next: README.md, "Your own data".'

# After a change of pyproject.toml. One set for Python 3.11 and later: --universal. The lock files hold no address: the one in
# force where they are used is asked.
lock:
	uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.11 --generate-hashes \
	  --output-file requirements.lock pyproject.toml
	uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.11 --generate-hashes --group dev \
	  --constraints requirements.lock --output-file requirements-dev.lock pyproject.toml
	uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.11 --generate-hashes --extra gpu \
	  --constraints requirements.lock --output-file requirements-gpu.lock pyproject.toml

clean:
	rm -rf .venv demo
