PYTHON ?= python3
EXPERIMENT ?=
DATA ?=
ARGS ?=
TORCHRUN ?=

VENV := .venv
IMAGE := .venv-kaggle
PCAM := $(VENV)/bin/python -m pcam_kaggle
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# One word for the shell, whatever spaces and quotes the value has.
quoted = '$(subst ','\'',$(1))'
WITH_DATA = $(if $(DATA),PCAM_DATA=$(call quoted,$(DATA)))
OPTIONS = $(if $(DATA),--data $(call quoted,$(DATA))) $(if $(EXPERIMENT),-e $(call quoted,$(EXPERIMENT))) $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help submission compare report scores kernel kernel-test kernel-push kernel-status kernel-logs kernel-output submit \
	leaderboard test coverage mutants torture fuzz bench bench-full data lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "DATA=folder       the competition's data (also PCAM_DATA)"
	@echo "EXPERIMENT=name   bottleneck (default), quick, plain, bottleneck_d4, two_stream, lite0, lite0_stain, lite0_again, blend, best"
	@echo "TORCHRUN='…'      several processes on one fold: TORCHRUN='--standalone --nproc-per-node 2 --max-restarts 3'"
	@echo "ARGS='…'          more options, for example ARGS='--set epochs=20 --name longer'"

# torchrun's workers would share one store over all restarts, and find in it the addresses of the dead.
submission: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE = 1
submission: $(VENV)/run.stamp ## everything from patches to submissions/<name>.csv; without data, the synthetic demo
	@$(if $(TORCHRUN),$(VENV)/bin/python -m torch.distributed.run $(TORCHRUN) -m pcam_kaggle,$(PCAM)) pipeline $(OPTIONS)

compare: $(VENV)/run.stamp ## compare all runs, out of fold
	@$(PCAM) compare $(ARGS)

report: $(VENV)/run.stamp ## the same with figures, as one HTML file in reports/
	@$(PCAM) report $(ARGS)

scores: $(VENV)/dev.stamp ## benchmarks/SCORES.md: every experiment and trial out of fold; trains what has no record
	@$(WITH_DATA) $(VENV)/bin/python -m benchmarks.scores $(ARGS)

kernel: $(VENV)/dev.stamp ## notebooks/pcam_submission.ipynb, the package as one notebook
	@$(PCAM) kernel build

kernel-push: $(VENV)/dev.stamp ## push it with Kaggle's client, in the name of its credentials
	@$(PCAM) kernel push $(if $(EXPERIMENT),-e $(call quoted,$(EXPERIMENT))) $(ARGS)

kernel-status: $(VENV)/dev.stamp ## how the kernel stands
	@$(PCAM) kernel status

kernel-logs: $(VENV)/dev.stamp ## what it printed
	@$(PCAM) kernel logs

kernel-output: $(VENV)/dev.stamp ## take what it made into runs/, to compare and to blend
	@$(PCAM) kernel output

submit: $(VENV)/dev.stamp ## send submissions/<EXPERIMENT>.csv to Kaggle, with its OOF AUC as description
	@$(PCAM) submit $(if $(EXPERIMENT),$(call quoted,$(EXPERIMENT))) $(ARGS)

leaderboard: $(VENV)/dev.stamp ## record Kaggle's scores of what was submitted
	@$(PCAM) leaderboard

kernel-test: $(VENV)/dev.stamp $(IMAGE)/image.stamp ## run it as Kaggle does, on the versions of Kaggle's image
	@PCAM_KAGGLE_PYTHON=$(call quoted,$(CURDIR)/$(IMAGE)/bin/python) $(VENV)/bin/python -m pytest tests/test_kernel.py

test: $(VENV)/dev.stamp ## all tests; those on real patches where PCAM_DATA is set
	@$(VENV)/bin/python -m pytest

coverage: $(VENV)/dev.stamp ## the same, and the lines of pcam_kaggle that they run
	@$(VENV)/bin/coverage erase
	@$(VENV)/bin/coverage run -m pytest
	@$(VENV)/bin/coverage combine --quiet
	@$(VENV)/bin/coverage report --skip-covered

mutants: $(VENV)/dev.stamp ## change folds, blend, metrics, submission and tta in every small way; which changes does no test see?
	@rm -rf mutants
	@$(VENV)/bin/mutmut run
	@$(VENV)/bin/mutmut results

torture: $(VENV)/run.stamp ## kill 30 runs at random moments; each must resume and end bit-identical
	@$(WITH_DATA) $(VENV)/bin/python -m benchmarks.torture $(ARGS)

fuzz: $(VENV)/dev.stamp ## change 500 inputs; each must end in one line, or in the very same result
	@$(VENV)/bin/python -m benchmarks.fuzz $(ARGS)

bench: $(VENV)/bench.stamp ## benchmarks/RESULTS.md: speed against what people use and against the limit; needs data, up to 40 minutes
	@$(WITH_DATA) $(VENV)/bin/python -m benchmarks.bench $(ARGS)

bench-full: $(VENV)/dev.stamp ## its last section: every stage at the competition's full size, on 277,483 synthetic patches
	@$(VENV)/bin/python -m benchmarks.full

data: $(VENV)/dev.stamp ## download, verify and unpack the competition with Kaggle's client
	@$(PCAM) data

lint: $(VENV)/dev.stamp ## ruff, check and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

clean: ## delete the environment and the demo, nothing else
	rm -rf $(VENV) $(IMAGE) demo

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

$(IMAGE)/image.stamp: requirements-kaggle.txt
	@echo "installing requirements-kaggle.txt into $(IMAGE), about two minutes"
	@$(call quoted,$(PYTHON)) -m venv $(IMAGE)
	@$(IMAGE)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-kaggle.txt
	@touch $@
