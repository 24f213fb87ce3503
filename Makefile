# litezoo: every target creates or refreshes .venv by itself (stamp on setup.cfg). `make` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
ZOO := $(BIN)/litezoo

# glibc would give every freed weight back and clear it again: a third of the tests' time
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=4294967296

DEVICE ?= cpu
DATA ?= digits

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-export-all check lint types docs wheel export bench profile guidelines pick predict report digits fits networks readme recommendations clean FORCE

help: ## list the targets
	@echo "litezoo: lightweight CNNs from recipe to verified, measured engine"
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "litezoo needs Python 3.11 or newer; name one: make PYTHON=python3.11 ..." >&2; exit 4; }
	@echo "creating $(VENV) (torch and its libraries: about 6 GB, some minutes)" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --disable-pip-version-check pip
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	# for its protobuf schema alone: it pins an older protobuf than onnx has
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps tritonclient
	@touch $@

install: $(STAMP) ## create or refresh .venv

demo: $(STAMP) ## the main job on the embedded digits: train, fuse, export for this CPU, verify, measure
	$(ZOO) train repvgg_a0 --data digits
	$(ZOO) export --device cpu --out artifacts/demo
	$(ZOO) verify artifacts/demo
	$(ZOO) bench artifacts/demo --pytorch --end-to-end --keep-disturbed --results runs/demo

train-%: $(STAMP) FORCE ## train a family or model: make train-repvgg [DATA=dir] [ARGS="--trainer.max_epochs 3"]
	$(ZOO) train $* --data '$(DATA)' $(ARGS)

export: $(STAMP) ## verified engines: make export DEVICE=t4 [MODEL=] [WEIGHTS=tag|file|random] [PRECISION=] [OUT=]
	$(ZOO) export $(MODEL) --device $(DEVICE) $(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(PRECISION),--precision $(PRECISION)) $(if $(OUT),--out '$(OUT)') $(ARGS)

bench: $(STAMP) ## measure the reference set, or MODELS, beside timm: make bench DEVICE=cpu [MODELS="a b"]
	$(ZOO) bench --device $(DEVICE) $(if $(MODELS),--models $(MODELS),--reference-set --peers) $(ARGS)

profile: $(STAMP) ## parameters, MACs, bytes moved, roofline time per layer: make profile MODEL= DEVICE= [HTML=]
	$(ZOO) profile $(MODEL) --device $(DEVICE) $(if $(PRECISION),--precision $(PRECISION)) $(if $(HTML),--html '$(HTML)') $(ARGS)

guidelines: $(STAMP) ## measure the design rules on this chip: make guidelines DEVICE=
	$(ZOO) guidelines --device $(DEVICE) $(ARGS)

pick: $(STAMP) ## ranked backbones under a budget: make pick DEVICE=t4 LATENCY_MS=2
	$(ZOO) pick --device $(DEVICE) $(if $(LATENCY_MS),--latency-ms $(LATENCY_MS)) $(ARGS)

predict: $(STAMP) ## what a network would take: make predict MODEL=timm:resnext50_32x4d DEVICE=rtx3090 [ARGS="--explain"]
	$(ZOO) predict $(MODEL) --device $(DEVICE) $(if $(PRECISION),--precision $(PRECISION)) $(ARGS)

report: $(STAMP) ## one self-contained HTML page of all results: report.html
	$(ZOO) report $(ARGS)

digits: $(STAMP) ## train every family on the embedded digits: docs/digits.md (half an hour)
	$(BIN)/python tests/train_families.py

fits: $(STAMP) ## fit and validate the predictor: docs/predictor.md, docs/recommendations.md (minutes)
	$(BIN)/python -m litezoo.benchmarks.validate --write
	$(MAKE) recommendations

networks: $(STAMP) ## write benchmarks/networks.json anew (ARGS=--check: compare)
	$(BIN)/python -m litezoo.benchmarks.tracing $(ARGS)

readme: $(STAMP) ## refresh the README's table from benchmarks/results
	$(ZOO) report --readme README.md

recommendations: $(STAMP) ## refresh docs/recommendations.md from measured, published and predicted rows
	$(BIN)/python -m litezoo.benchmarks.recommend

test-export-all: $(STAMP) ## every model at fp32, fp16, int8 in two runtimes: docs/export.md (an hour)
	$(BIN)/python tests/export_all.py

test: $(STAMP) ## the tests
	$(KEEP_MEMORY) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict, and pyright on the public API
	$(BIN)/mypy -p litezoo
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP) ## run the README's commands and check its table
	$(BIN)/python tests/run_readme.py README.md
	$(ZOO) report --readme README.md --check
	$(BIN)/python -m litezoo.benchmarks.recommend --check
	$(ZOO) bench --check

wheel: $(STAMP) ## install the wheel in a fresh environment and drive it from outside the checkout
	$(BIN)/python tests/drive_wheel.py

check: lint types test docs wheel ## exactly what CI runs

clean: ## remove what targets made, but for runs/, artifacts/ and results
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .hypothesis
