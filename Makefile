PYTHON ?= python3
EXPERIMENT ?=
DATA ?=
ARGS ?=
TORCHRUN ?=

VENV := .venv
# Environments with the package versions of Kaggle's current image and of the next one.
IMAGES := .venv-kaggle .venv-kaggle-next
PCAM := $(VENV)/bin/python -m pcam_kaggle
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# One torch thread per worker: two workers share the cores of a laptop.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal
# One word for the shell, whatever spaces and quotes the value has.
quoted = '$(subst ','\'',$(1))'
WITH_DATA = $(if $(DATA),PCAM_DATA=$(call quoted,$(DATA)))
OPTIONS = $(if $(DATA),--data $(call quoted,$(DATA))) $(if $(EXPERIMENT),-e $(call quoted,$(EXPERIMENT))) $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help submission compare report scores kaggle kernel kernel-test kernel-push kernel-status kernel-logs kernel-output submit \
	leaderboard test test-all coverage mutants torture fuzz bench bench-full data lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "DATA=folder       the competition's data (also PCAM_DATA)"
	@echo "EXPERIMENT=name   bottleneck (default), quick, plain, bottleneck_d4, lite0, pretrained, blend, best"
	@echo "TORCHRUN='…'      several processes on one fold: TORCHRUN='--standalone --nproc-per-node 2 --max-restarts 3'"
	@echo "ARGS='…'          more options, for example ARGS='--set epochs=20 --name longer'"

# Otherwise torchrun's workers share one store over all restarts, which still holds the addresses of dead processes.
submission: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE = 1
submission: $(VENV)/run.stamp ## everything from patches to submissions/<name>.csv; without data, the synthetic demo
	@$(if $(TORCHRUN),$(VENV)/bin/python -m torch.distributed.run $(TORCHRUN) -m pcam_kaggle,$(PCAM)) pipeline $(OPTIONS)

compare: $(VENV)/run.stamp ## compare all runs, out of fold
	@$(PCAM) compare $(ARGS)

report: $(VENV)/run.stamp ## the same with figures, as one HTML file in reports/
	@$(PCAM) report $(ARGS)

scores: $(VENV)/dev.stamp ## benchmarks/SCORES.md: scores of every experiment and trial; trains rows without a record
	@$(WITH_DATA) $(VENV)/bin/python -m benchmarks.scores $(ARGS)

kaggle: $(VENV)/dev.stamp ## train EXPERIMENT on Kaggle: push, follow, download, compare; ARGS=--submit for its scores
	@$(PCAM) kaggle run $(if $(EXPERIMENT),-e $(call quoted,$(EXPERIMENT))) $(ARGS)

kernel: $(VENV)/dev.stamp ## notebooks/pcam_submission.ipynb, the package as one notebook
	@$(PCAM) kaggle build

kernel-push: $(VENV)/dev.stamp ## push it to Kaggle with the client's credentials
	@$(PCAM) kaggle push $(if $(EXPERIMENT),-e $(call quoted,$(EXPERIMENT))) $(ARGS)

kernel-status: $(VENV)/dev.stamp ## print the kernel's status
	@$(PCAM) kaggle status $(ARGS)

kernel-logs: $(VENV)/dev.stamp ## print the kernel's log
	@$(PCAM) kaggle logs $(ARGS)

kernel-output: $(VENV)/dev.stamp ## download its output and import its runs, to compare and to blend
	@$(PCAM) kaggle output $(ARGS)

submit: $(VENV)/dev.stamp ## submit submissions/<EXPERIMENT>.csv to Kaggle, with its OOF AUC as description
	@$(PCAM) kaggle submit $(if $(EXPERIMENT),$(call quoted,$(EXPERIMENT))) $(ARGS)

leaderboard: $(VENV)/dev.stamp ## record Kaggle's scores of what was submitted
	@$(PCAM) kaggle leaderboard

kernel-test: $(VENV)/dev.stamp $(IMAGES:%=%/image.stamp) ## run it as Kaggle does, on the versions of two of Kaggle's images
	@PCAM_KAGGLE_PYTHON="$$(printf '%s/bin/python:' $(IMAGES))" $(VENV)/bin/python -m pytest tests/test_notebook_kernel.py

test: $(VENV)/dev.stamp ## all tests but the slow ones, on two cores in under three minutes
	@$(PYTEST)

test-all: $(VENV)/dev.stamp ## all tests; those on real patches run if PCAM_DATA is set
	@$(PYTEST) -m ''

coverage: $(VENV)/dev.stamp ## run all tests in one process and report the line coverage of pcam_kaggle
	@$(VENV)/bin/coverage erase
	@$(VENV)/bin/coverage run -m pytest -m ''
	@$(VENV)/bin/coverage combine --quiet
	@$(VENV)/bin/coverage report --skip-covered

mutants: $(VENV)/dev.stamp ## change folds, blend, metrics, submission and tta in every small way; which changes does no test see?
	@rm -rf mutants
	@$(VENV)/bin/mutmut run
	@$(VENV)/bin/mutmut results

torture: $(VENV)/run.stamp ## kill 30 runs at random moments; each must resume and be bit-identical to an uninterrupted run
	@$(WITH_DATA) $(VENV)/bin/python -m benchmarks.torture $(ARGS)

fuzz: $(VENV)/dev.stamp ## damage 500 input files; each must end in a one-line error or in an unchanged result
	@$(VENV)/bin/python -m benchmarks.fuzz $(ARGS)

bench: $(VENV)/bench.stamp ## benchmarks/RESULTS.md: speed against common implementations and the limit; needs data, about 15 minutes
	@$(WITH_DATA) $(VENV)/bin/python -m benchmarks.bench $(ARGS)

bench-full: $(VENV)/dev.stamp ## its last table: every stage at the competition's full size, on 277,483 synthetic patches
	@$(VENV)/bin/python -m benchmarks.full

data: $(VENV)/dev.stamp ## download, verify and unpack the competition with Kaggle's client
	@$(PCAM) kaggle download

lint: $(VENV)/dev.stamp ## ruff (check and format) and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean: ## delete the environments and the demo, nothing else
	rm -rf $(VENV) $(IMAGES) demo

$(VENV)/run.stamp: requirements.txt
	@echo "installing requirements.txt into $(VENV), about two minutes"
	@$(call quoted,$(PYTHON)) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt requirements-pretrained.txt $(VENV)/run.stamp
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/bench.stamp: requirements-bench.txt $(VENV)/run.stamp
	@echo "installing requirements-bench.txt into $(VENV)"
	@$(PIP) -r requirements-bench.txt
	@touch $@

$(VENV)-%/image.stamp: requirements-%.txt
	@echo "installing $< into $(@D), about two minutes"
	@$(call quoted,$(PYTHON)) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
