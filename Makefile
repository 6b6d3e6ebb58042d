# Everything here sets itself up: Python, pip and make are all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Threads sleep while they wait for one another: spinning ones compete for cores that others use too.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests start many processes: what one has compiled serves the next.
unexport PYTHONDONTWRITEBYTECODE
# Tests are spread over the cores. They draw from the same seed every time; `make test SEED=7` draws others.
SEED ?= 0
# Torch ships Triton 3.6 with 2.11, 3.7.0 with 2.12, 3.7.1 with 2.13, 3.8 with 2.14. `make kernels` takes the oldest and newest.
TRITONS ?= 3.6.0 3.9.0
SPREAD = -n auto --dist loadfile --no-loadscope-reorder -W ignore --seed $(SEED)

.PHONY: demo app test quick conformance lint docs matrix oldest kernels compiled gpu dist wheel calibrations objective frontier both carry bench wallclock
.PHONY: model-data model-vae model-unet model-resume model-export model-evaluate
.PHONY: model-flow model-flow-decay model-flow-export model-flow-evaluate install clean

demo: install ## a contact sheet of rules and policies on the bundled model, in out/compare
	$(BIN)/diffusers-guidance compare --out out/compare

app: install ## the page, on localhost
	$(BIN)/diffusers-guidance app

test: install ## every test but those of make conformance
	$(BIN)/pytest $(SPREAD)

quick: install ## the tests without a browser, a cluster or a process of their own; about a minute
	$(BIN)/pytest $(SPREAD) -m "not slow" $(patsubst %,--ignore tests/%,app bench docs search shell training samples)

conformance: install ## checks the promises of attach on every pipeline of docs/pipelines.md; minutes; or UNDER=triton,autocast
	$(if $(findstring triton,$(UNDER)),TRITON_INTERPRET=1) $(BIN)/pytest tests/zoo/conformance_suite.py --under "$(UNDER)"

lint: install ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && $(BIN)/pip install --quiet --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p diffusers_guidance

docs: install ## the site, in build/site; a broken link or a missing reference fails
	rm -rf build/typed && $(BIN)/pip install --quiet --no-deps --target build/typed .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

matrix: ## the tests with the lowest and the newest declared versions, or with some: make matrix ROWS="oldest"; long
	$(PYTHON) tests/matrix/run.py $(ROWS)

oldest: install ## a part of that: the tests of loading with the oldest libraries, on this environment's torch
	$(BIN)/python tests/matrix/run.py --part

kernels: install ## compiles every kernel for sm_80, sm_90 and gfx942 with each Triton of TRITONS, refuses spills, and interprets
	set -e; for version in $(TRITONS); do \
		folder=build/triton/$$version; \
		test -d $$folder/triton || $(BIN)/pip install --quiet --no-deps --target $$folder triton==$$version; \
		PYTHONPATH=$$folder $(BIN)/python -W ignore -m diffusers_guidance.kernels.compile; \
		PYTHONPATH=$$folder $(BIN)/pytest -q -W ignore --seed $(SEED) tests/kernels/test_interpreter.py; \
	done

compiled: install ## a part of that: this environment's Triton, for sm_90
	$(BIN)/python -W ignore -m diffusers_guidance.kernels.compile sm_90

gpu: install ## every check that needs a GPU, in eight minutes; without a GPU it only shows that the checks run
	$(BIN)/python benchmarks/gpu.py

dist: install ## the source archive and the wheels that a release uploads, in dist/ (docs/releasing.md)
	rm -rf dist build/lib build/bdist.* samples/build
	$(BIN)/python -m build --outdir dist .
	[ ! -f samples/emoji-flow/model_index.json ] || $(BIN)/python -m build --wheel --outdir dist samples
	rm -rf samples/build samples/*.egg-info
	$(BIN)/twine check --strict dist/*

wheel: dist ## tries the wheels in an environment of their own, from another folder
	rm -rf build/wheel && $(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet torch -c constraints.txt
	build/wheel/venv/bin/pip install --quiet dist/*.whl -c constraints.txt
	cd build/wheel && venv/bin/python ../../tests/wheel.py

calibrations: install ## makes the bundled model's, in samples/calibrations; this and the next two resume
	$(BIN)/python benchmarks/calibrations.py

objective: install ## measures the premises of the search for schedules, in docs/results/policies
	$(BIN)/python benchmarks/objective.py

frontier: install ## measures fidelity against NFEs for every policy, in docs/results/policies
	$(BIN)/python benchmarks/policies.py

both: install ## makes the README's table and picture of both models; resumes
	$(BIN)/python benchmarks/both.py

carry: install ## measures what carries over from one model to the other, in docs/results/carry; resumes
	$(BIN)/python benchmarks/carry.py

bench: install ## measures what policies save and cost on both bundled models, in docs/results/bench and bench-flow; resumes
	$(BIN)/diffusers-guidance bench --out out/bench
	$(BIN)/diffusers-guidance bench --suite emoji-flow --out out/bench-flow
	$(BIN)/python benchmarks/publish.py out/bench out/bench-flow

wallclock: install ## times what skipped evaluations save at real size; needs a GPU
	$(BIN)/python benchmarks/wallclock.py

model-data: install ## makes the bundled model's data set, from the package registries (needs npm); a minute
	$(BIN)/python benchmarks/training/data.py

model-vae: install ## trains its autoencoder; resumes
	$(BIN)/python benchmarks/training/autoencoder.py

model-unet: install ## trains its text encoder and UNet; resumes
	$(BIN)/python benchmarks/training/text_to_image.py
	$(BIN)/python benchmarks/training/text_to_image.py --minutes 140 --flat 0

model-resume: install ## turns the weights that ship into checkpoints to train further (after model-data)
	$(BIN)/python benchmarks/training/resume.py

model-export: install ## writes samples/emoji from the last checkpoints
	$(BIN)/python benchmarks/training/export.py

model-evaluate: install ## makes the numbers and pictures of its card
	$(BIN)/python benchmarks/training/evaluate.py
	$(BIN)/python benchmarks/training/showcase.py

model-flow: install ## trains the second model's text encoder and transformer (after model-data and model-resume); resumes
	$(BIN)/python benchmarks/training/flow.py

model-flow-decay: install ## ends a copy of that run in an hour; the run itself can continue
	$(BIN)/python benchmarks/training/flow.py --decay-minutes 60

model-flow-export: install ## writes samples/emoji-flow from the last checkpoints
	$(BIN)/python benchmarks/training/export.py emoji-flow

model-flow-evaluate: install ## makes the numbers and pictures of its card
	$(BIN)/python benchmarks/training/evaluate.py --model samples/emoji-flow --keep out/model/generated-flow
	$(BIN)/python benchmarks/training/showcase.py --model samples/emoji-flow --keep out/model/generated-flow
	$(BIN)/python benchmarks/training/card.py samples/emoji-flow

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info samples/build samples/*.egg-info
