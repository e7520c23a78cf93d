# Every target sets up what it needs. Nothing outside this folder is touched.
PYTHON ?= python3
WORKSPACE ?= build/workspace
PORT ?= 8000
BIN := .venv/bin
PEERS := build/bench/peers/deepctr_torch/ready build/bench/peers/fuxictr/ready
SERVERS := $(patsubst %,build/bench/peers/%/ready,fastapi litserve bentoml ray_serve mosec)
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help demo serve test test-load lint check format clean bench-store bench-training bench-serving bench-soak bench-overload bench-startup check-k8s check-container

help: ## Show what there is
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: .venv/$(if $(STORE),dev,train) ## Real data to served scores: import, train, evaluate, export, serve, score
	$(BIN)/ecdctr --workspace $(WORKSPACE) demo $(if $(STORE),--store $(STORE))

serve: .venv/train ## Serve the model of the demo on port 8000 until stopped
	$(BIN)/ecdctr --workspace $(WORKSPACE) serve --port $(PORT)

test: lint ## Lint, types and all tests (starts and stops the servers that it needs)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-load: .venv/dev ## Overload, memory and hostile requests at full length, for a quiet machine
	$(BIN)/python -m pytest -s tests/load
	ECDCTR_FUZZ=100000 $(BIN)/python -m pytest tests/test_fuzz.py --timeout 3000

check: test ## The same: what CI runs

check-k8s: .venv/dev ## The Kubernetes manifests: schemas, rules, planted faults
	$(BIN)/python -m pytest tests/test_k8s.py tests/test_operations.py

check-container: .venv/dev ## The images: install as the Dockerfile does, and score from there
	$(BIN)/python -m pytest tests/test_container.py

bench-store: .venv/dev ## Memory, publishing and lookups of the store, on real servers
	$(BIN)/python -m benchmarks.store

bench-training: .venv/train $(PEERS) ## Training speed beside DeepCTR-Torch and FuxiCTR
	$(BIN)/python -m benchmarks.training

bench-serving: .venv/dev $(SERVERS) ## This service beside FastAPI, LitServe, BentoML, Ray Serve, mosec
	@test -d $(WORKSPACE)/models || $(MAKE) demo
	$(BIN)/python -m benchmarks.serving --bundle-from $(WORKSPACE)

bench-soak: .venv/dev ## An hour at half load, a swap a minute, a store that freezes every ten
	@test -d $(WORKSPACE)/models || $(MAKE) demo
	$(BIN)/python -m benchmarks.soak --bundle-from $(WORKSPACE)

bench-overload: .venv/dev ## Twice as many requests as can be answered
	@test -d $(WORKSPACE)/models || $(MAKE) demo
	$(BIN)/python -m benchmarks.overload --bundle-from $(WORKSPACE)

bench-startup: .venv/dev ## How soon a bundle of 2.5 GB is served, and what two workers share
	@test -d $(WORKSPACE)/models || $(MAKE) demo
	$(BIN)/python -m benchmarks.startup --bundle-from $(WORKSPACE)

build/bench/peers/%/ready: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(@D)
	@echo "Installing $* in a place of its own ..."
	$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

lint: .venv/dev ## Style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove all that was built, trained and installed
	rm -rf build .venv *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing the training dependencies ..."
	$(INSTALL) --editable '.[train]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing the development dependencies ..."
	$(INSTALL) --editable '.[dev]'
	@touch $@ .venv/train
