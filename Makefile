# make demo: fine-tune the small pretrained model of the package, evaluate and export it.  make test: the tests.  make check: format,
# lint, types and documentation.
# make test-long: what takes minutes (fault campaigns, fuzzing, learning); it prints tables, which are for docs/reliability.md.
PYTHON ?= python3
TORCH ?= torch>=2.8
EXTRAS ?= dev
VENV := .venv
BIN := $(VENV)/bin
# Slurm's daemons are in sbin, which is not on every PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH):/usr/sbin:/sbin

.PHONY: demo base test test-long check lint types docs install golden clean

# Ranks of the demo: on a CPU two of ZeRO-2 are the fastest for a million weights, which need no partition; `deepspeed train.py --deepspeed ds_configs/z3.json`
# finds the same losses.
RANKS ?= $(if $(shell command -v nvidia-smi),1,2)

# bfloat16 where the processor multiplies matrices in it (AMX, AVX-512), two to five times as fast as float32.
BF16 ?= $(if $(shell command -v nvidia-smi),auto,$(if $(shell grep -m 1 _bf16 /proc/cpuinfo 2>/dev/null),true,auto))

demo: install
	deepspeed --num_gpus $(RANKS) train.py --deepspeed ds_configs/z2.json --train.bf16 $(BF16) --train.per_device_train_batch_size $$((12 / $(RANKS)))
	@python -m cfvlm_ds.demo.report runs/quickstart
	@echo "model: runs/quickstart/export   tracking: cd runs/quickstart && ../../$(BIN)/mlflow ui"
	@echo "results, with four pictures and what the model writes: runs/quickstart/results.html"

# The demo's pretrained model, made anew in an hour of two cores: its vision tower learns labels, then the model learns to see, then habits.
base: install
	python benchmarks/base_tower.py
	deepspeed --num_gpus 2 train.py --deepspeed ds_configs/z2.json --config benchmarks/base_sees.yaml
	deepspeed --num_gpus 2 train.py --deepspeed ds_configs/z2.json --config benchmarks/base.yaml
	python benchmarks/base_tower.py --publish runs/base/export cfvlm_ds/demo/base_checkpoint

test: install
	$(MAKE) --jobs 2 --output-sync check
	tests/slurm/install.sh
	pytest -n 3 --dist loadfile --no-loadscope-reorder  # a file's tests share what they train

test-long: install
	tests/slurm/install.sh
	tests/support/install_chromium.sh
	pytest -n 3 --dist loadfile --no-loadscope-reorder -m "long or browser" -rP

check: lint types docs

lint: install
	ruff format --check .
	ruff check .
	shellcheck -x slurm/*.sh tests/slurm/*.sh tests/support/*.sh

types: install
	mypy

docs: install
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict  # never with --quiet, which hides warnings from --strict too

golden: install
	python tests/support/write_golden.py

install: $(VENV)/.installed

# DeepSpeed looks at the installed torch while it is built: torch comes first, and the rest without build isolation.
# Compiled at the end on all cores, where pip takes one; some packages have files that are not meant for this Python.
$(VENV)/.installed: pyproject.toml tests/pipeline.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel packaging ninja py-cpuinfo
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)" "torchvision>=0.23" "numpy>=1.26"
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --require-hashes --requirement tests/pipeline.txt
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib cfvlm_ds >/dev/null 2>&1 || true
	touch $@

clean:
	rm -rf $(VENV) runs site
