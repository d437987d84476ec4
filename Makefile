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
# One torch thread per worker: two workers share the cores of a laptop, and results are bit-identical for a fixed number only.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal
# One word for the shell, whatever spaces and quotes the value has.
quoted = '$(subst ','\'',$(1))'
PIPELINE = $(if $(TORCHRUN),$(VENV)/bin/python -m torch.distributed.run $(TORCHRUN) -m pcam_kaggle,$(PCAM)) pipeline
OPTIONS = $(if $(DATA),--data $(call quoted,$(DATA))) $(if $(EXPERIMENT),-e $(call quoted,$(EXPERIMENT))) $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help submission demo compare report kaggle notebook data test test-all kernel-test lint coverage mutants stress bench \
	scores clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "DATA=folder       the competition's data (also PCAM_DATA)"
	@echo "EXPERIMENT=name   bottleneck (default), quick, plain, bottleneck_d4, lite0, pretrained, dinov2,"
	@echo "                  bottleneck_distilled, blend"
	@echo "TORCHRUN='…'      several processes on one fold: TORCHRUN='--standalone --nproc-per-node 2 --max-restarts 3'"
	@echo "ARGS='…'          more options, for example ARGS='--set epochs=20 --name longer'"

# Otherwise torchrun's workers share one store over all restarts, which still holds the addresses of dead processes.
submission demo: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE = 1
submission: $(VENV)/run.stamp ## everything from patches to submissions/<name>.csv; without data, the synthetic demo
	@$(PIPELINE) $(OPTIONS)

demo: $(VENV)/run.stamp ## everything from patches to a submission on synthetic patches, in demo/
	@$(PIPELINE) --demo $(OPTIONS)

compare: $(VENV)/run.stamp ## compare all runs, out of fold
	@$(PCAM) compare $(ARGS)

report: $(VENV)/run.stamp ## write an HTML report of all runs to reports/
	@$(PCAM) report $(ARGS)

kaggle: $(VENV)/client.stamp ## train EXPERIMENT on Kaggle: push, follow, download, compare; ARGS=--submit for its scores
	@$(PCAM) kaggle run $(if $(EXPERIMENT),-e $(call quoted,$(EXPERIMENT))) $(ARGS)

notebook: $(VENV)/run.stamp ## write notebooks/pcam_submission.ipynb, the package as one notebook
	@$(PCAM) kaggle notebook

data: $(VENV)/client.stamp ## download, verify and unpack the competition's data with Kaggle's client
	@$(PCAM) kaggle download

test: $(VENV)/dev.stamp ## run all tests but the slow ones, on two cores in under three minutes
	@$(PYTEST)

test-all: $(VENV)/dev.stamp ## run all tests; those on real patches run if PCAM_DATA is set
	@$(PYTEST) -m ''

kernel-test: $(VENV)/dev.stamp $(IMAGES:%=%/image.stamp) ## run the notebook as Kaggle does, with the packages of two of its images
	@OMP_NUM_THREADS=2 PCAM_KAGGLE_PYTHON="$$(printf '%s/bin/python:' $(IMAGES))" $(VENV)/bin/python -m pytest tests/test_notebook_kernel.py

lint: $(VENV)/dev.stamp ## run ruff (check and format) and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

coverage: $(VENV)/dev.stamp ## run all tests in one process and report the branch coverage of pcam_kaggle
	@$(VENV)/bin/coverage erase
	@OMP_NUM_THREADS=1 $(VENV)/bin/coverage run -m pytest -m ''
	@$(VENV)/bin/coverage combine --quiet
	@$(VENV)/bin/coverage report --skip-covered

mutants: $(VENV)/dev.stamp ## change folds, blend, metrics, submission and tta in every small way; list the changes that no test sees
	@rm -rf mutants
	@OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run
	@$(VENV)/bin/mutmut results

stress: $(VENV)/dev.stamp ## kill runs, which must resume bit-identically; damage input files, which must end in a one-line error
	@$(VENV)/bin/python -m benchmarks.stress $(or $(ARGS),kills)
	@$(if $(ARGS),,$(VENV)/bin/python -m benchmarks.stress damages)

bench: $(VENV)/dev.stamp ## write benchmarks/RESULTS.md: speed compared with common implementations; ARGS=SECTION for one table
	@$(if $(DATA),PCAM_DATA=$(call quoted,$(DATA))) $(VENV)/bin/python -m benchmarks.bench $(ARGS)

scores: $(VENV)/run.stamp ## write benchmarks/SCORES.md from the records of all scores; ARGS=RUN records a run first
	@$(VENV)/bin/python -m benchmarks.scores $(ARGS)

clean: ## delete the environments and the demo, nothing else
	rm -rf $(VENV) $(IMAGES) demo

$(VENV)/run.stamp: requirements.txt
	@echo "installing requirements.txt into $(VENV), about two minutes"
	@$(call quoted,$(PYTHON)) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/client.stamp: requirements-client.txt $(VENV)/run.stamp
	@echo "installing requirements-client.txt into $(VENV)"
	@$(PIP) -r requirements-client.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt requirements-pretrained.txt requirements-client.txt $(VENV)/run.stamp
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)-%/image.stamp: requirements-%.txt
	@echo "installing $< into $(@D), about two minutes"
	@$(call quoted,$(PYTHON)) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
