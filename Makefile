# make train      from nothing to a scored artifact on this machine, about three minutes on two cores
# make train-mlx  the same in MLX: through Metal on Apple Silicon; shortened on Linux, where MLX's CPU build is slow
# make generate   the newest artifact goes on from PROMPT="text"; OPTIONS="--temperature 0.8", ARTIFACT=FILE
# make test       everything that CI runs but the linter; WORKERS=1 for one test at a time
# make bench      step time and its share of the machine's matmul rate
# make site       the records as pages: site/index.html; LINK=https://host/name/blob/main links to the files
# make watch      the runs in progress, live; OPTIONS="--against BytePPM", OPTIONS=--web for a page
# make audit      is every number legal? probes of every script at a tiny size, one to three minutes each
# make gpu-check  one command for a day with a GPU, without a network; TEXT=FILE (.txt, .jsonl, .jsonl.zst) trains on
#                 that instead of the standard library
# make clean      removes .venv, the pages and the small corpus; runs/ and your own data stay
# TRAIN="NAME=VALUE ..." changes settings of train and train-mlx
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
RUN := $(shell date +%Y%m%d-%H%M%S)-train
CORPUS := data/datasets/stdlib_byte260

.PHONY: train train-mlx generate data test lint site watch audit bench gpu-check clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and "Python 3.10 to 3.13 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-mlx.txt requirements-parquet.txt requirements-site.txt requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(CORPUS)/manifest.json: $(VENV)/.installed
	$(PY) data/prepare.py stdlib --force

data: $(CORPUS)/manifest.json

# The overrides are the whole configuration: change them here, or put others in front of torchrun.
SMALL := NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 \
  MLP_MULT=2 NGRAM_ORDERS=2,3,4,5,6 NGRAM_BUCKETS=16384 NGRAM_DIM=16 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=8192 \
  ITERATIONS=240 WARMDOWN_ITERS=120 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_STEPS=60 EMA_DECAY=0.98 TRAIN_LOG_EVERY=40 \
  EVAL_STRIDE=128 MAX_WALLCLOCK_SECONDS=0 EVAL_BUDGET_SECONDS=0

train: data
	env DATA_PATH=$(CORPUS) RUN_ID=$(RUN) $(SMALL) $(TRAIN) \
	  $(VENV)/bin/torchrun --standalone --nproc_per_node=1 train_gpt.py
	@echo "--- the same artifact, scored by a fresh process"
	env DATA_PATH=$(CORPUS) RUN_ID=$(RUN)-again EVAL_ONLY=1 ARTIFACT=runs/$(RUN)/artifact.bin EVAL_BUDGET_SECONDS=0 \
	  $(filter VAL_BYTES=% EVAL_%,$(TRAIN)) $(PY) train_gpt.py
	@echo "--- make generate PROMPT=\"def \" goes on from a text with it"

$(VENV)/.installed-mlx: requirements-mlx.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-mlx.txt
	touch $@

# A 27th of the text where MLX multiplies at some GFLOP/s.
SOME := VAL_BYTES=8192 EVAL_BATCH_TOKENS=4096
SHORT := $(if $(filter Darwin,$(shell uname)),,TRAIN_BATCH_TOKENS=1024 ITERATIONS=72 WARMDOWN_ITERS=36 $(SOME))

train-mlx: data $(VENV)/.installed-mlx
	env DATA_PATH=$(CORPUS) RUN_ID=$(RUN)-mlx $(SMALL) $(SHORT) $(TRAIN) $(PY) train_gpt_mlx.py
	@echo "--- the same artifact, scored by a fresh process"
	env DATA_PATH=$(CORPUS) RUN_ID=$(RUN)-mlx-again EVAL_ONLY=1 ARTIFACT=runs/$(RUN)-mlx/artifact.bin \
	  EVAL_BUDGET_SECONDS=0 $(filter $(SOME),$(SHORT)) $(filter VAL_BYTES=% EVAL_%,$(TRAIN)) $(PY) train_gpt_mlx.py

PROMPT ?= def
ARTIFACT ?= $(firstword $(shell ls -t runs/*/artifact.bin 2>/dev/null))

generate: export PROMPT := $(PROMPT)
generate: $(VENV)/.installed
	$(if $(ARTIFACT),,$(error runs/ has no artifact.bin: make train writes one, ARTIFACT=FILE names another))
	@$(PY) scripts/generate.py $(ARTIFACT) $(OPTIONS) -- "$$PROMPT"

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .

test: $(VENV)/.installed-dev
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal tests

$(VENV)/.installed-site: requirements-site.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-site.txt
	touch $@

site: $(VENV)/.installed-site
	$(PY) scripts/site.py $(if $(LINK),--link $(LINK))

watch: $(VENV)/.installed-site
	@$(PY) scripts/watch.py $(OPTIONS)

audit: $(VENV)/.installed
	$(PY) scripts/audit.py . $(dir $(wildcard records/*/train_gpt.py))

bench: $(VENV)/.installed
	$(PY) scripts/bench.py

# Nothing is installed for it: such machines often have no network, and a torch of their own.
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) scripts/bench.py --check $(if $(TEXT),--text "$(TEXT)")

clean:
	rm -rf $(VENV) site $(CORPUS)
