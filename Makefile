# Everything needs only Python 3.10 or later, make and the package registry. `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# Found by its path: else Python takes this folder itself for the package when it is started in the folder above.
BY_PATH := --config-settings editable_mode=compat

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types format docs bench sweep torture floors smoke clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' $(BY_PATH)
	@touch $@

demo: .venv/installed  ## extract photographs with trained weights from the package registry, draw their maps, compare them
	$(BIN)/python examples/demo.py demo

test: .venv/installed  ## run the tests
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

check: lint types test  ## lint, types and tests; changes nothing

format: .venv/installed  ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed  ## write the tables of options in docs/ anew, and run every page
	$(BIN)/python docs/write_options.py
	$(BIN)/python -m pytest -m "long or not long" tests/test_docs.py

bench: .venv/installed  ## measure start, memory, writer, large pictures and speed, as ratios (two hours)
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/memory.py --pictures build/pictures/small
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/unfinished.py --pictures build/pictures/many
	$(BIN)/python benchmarks/reading.py --pictures build/pictures/small
	ulimit -n 1024; $(BIN)/python benchmarks/shards.py
	$(BIN)/python benchmarks/outputs.py
	$(BIN)/python benchmarks/decoding.py --pictures build/pictures/large
	$(BIN)/python benchmarks/speed.py --pictures build/pictures/small

sweep: .venv/installed  ## every model of timm and transformers: writes docs/sweep.md and featcli/views/models.csv; weights that are not the network's; every kind of TIFF and JPEG 2000 (an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt rasterio av
	$(BIN)/python benchmarks/decoders.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/norms.py
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/bands.py
	$(BIN)/python benchmarks/corruption.py
	$(BIN)/python benchmarks/key_names.py
	$(BIN)/python benchmarks/damage.py
	$(BIN)/python benchmarks/conformance.py --write docs/conformance.md

torture: .venv/installed  ## a small run killed, or refused by the disk, at every call that changes it; hostile files (two hours; tests/torture.py --help takes it apart)
	$(BIN)/python -m pytest -m long
	$(BIN)/python tests/torture.py

floors: .venv/installed  ## the tests with every lower bound on the oldest Python, and with the newest of all (a quarter of an hour, 13 GB)
	$(BIN)/python tests/floors.py

smoke: .venv/installed  ## build the wheel, install it without the development tools elsewhere, extract two images
	rm -rf build/smoke && $(BIN)/python -m pip wheel --quiet --no-deps -w build/smoke .
	$(PYTHON) -m venv build/smoke/env
	build/smoke/env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/smoke/*.whl
	build/smoke/env/bin/featcli extract sample_images/nature/sea.jpg sample_images/things/flower.png \
	  -c resnet18 --random-init -o build/smoke/feats
	build/smoke/env/bin/featcli inspect build/smoke/feats

clean:  ## remove what was made here, the environment too
	rm -rf .venv build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
