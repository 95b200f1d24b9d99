# Commands for a fresh clone: python3 and make are enough, the rest is installed into .venv on first use.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
RAY := .venv-ray
TRL := .venv-trl
SERVING := .venv-serving
PEERS := .venv-peers
# PyTorch's own index of builds for machines without a GPU.
TORCH_CPU := https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Two processes, each with one thread: the models of the tests are tiny, so threads gain little, and beside another
# process they spin for a core that is taken. A process that has done its half of the files takes over of the other's.
PARALLEL = -n 2 --dist worksteal
# What must hold on every supported transformers, the oldest and whatever is the newest today.
EVERY_VERSION_TESTS = $(wildcard tests/test_golden_*.py) $(addprefix tests/test_, $(addsuffix .py, loading chat \
	processing bilevel images clients token_dropping families library before append packaging serve handler))
# What compares numbers, so what another processor could change.
NUMERIC_TESTS = $(EVERY_VERSION_TESTS) $(addprefix tests/test_, $(addsuffix .py, bundle clips evaluation flash_doors \
	flash_sampling modeling selection slow_members sparse_attention training training_slots))
# What uses other readers of files, and torchvision.
PEER_TESTS = $(addprefix tests/test_, $(addsuffix .py, clients left_out video_formats video_processing))
# Packages of requirements.txt that only some things need.
OPTIONAL = accelerate peft matplotlib

# What `make demo` asks, and what is right.
DEMO_QUESTIONS = "What color is the star?" "Which way does the ring move?" "Is the triangle small or large?" \
	"What is on the card with the purple ring?" "When is the card with the purple ring shown?"
DEMO_ANSWERS = "orange / right / large / egg / At 9 seconds"

# Nothing here may reach out for models; the tests are offline.
export HF_HUB_OFFLINE := 1

test test-all test-browser test-oldest test-newest test-ray test-serving test-trl test-without test-peers: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo page notebook screenshot train-small evaluate style format clean
.PHONY: test test-all test-browser test-oldest test-newest test-peers test-processors test-ray test-serving test-trl test-without

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## ask the bundled checkpoint about the bundled clip, in full and with sparse attention
	@echo "Full attention:"
	@echo
	@$(BIN)/python cli.py assets/demo.mp4 $(DEMO_QUESTIONS) --max-new-tokens 16 --stats
	@echo
	@echo "The clip in chunks (streaming prefill), the questions behind a part of its key-values (bi-level decoding):"
	@echo
	@$(BIN)/python cli.py assets/demo.mp4 $(DEMO_QUESTIONS) --max-new-tokens 16 --stats --prefill streaming --decode bilevel
	@echo
	@echo "To be seen in the clip:" $(DEMO_ANSWERS)

test: style ## style, then the tests that take seconds
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-all: style ## style, then all tests that need no GPU
	$(BIN)/python -m pytest $(PARALLEL) -m "not cuda" $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.installed ## loading, chat, bi-level and parity tests on the oldest supported transformers
	$(OLDEST)/bin/python -m pytest $(PARALLEL) $(EVERY_VERSION_TESTS) $(PYTEST_ARGS)

test-newest: newest ## the same on the newest release of everything but torch, installed anew
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check
	$(NEWEST)/bin/python -m pytest $(PARALLEL) $(EVERY_VERSION_TESTS) $(PYTEST_ARGS)

test-processors: $(VENV)/.installed ## tests that compare numbers, computed as other processors would (not part of CI)
	$(BIN)/python tests/processors.py $(PARALLEL) $(NUMERIC_TESTS) $(PYTEST_ARGS)

test-ray: $(RAY)/.installed ## many videos with Ray: actors and drivers that are killed (not part of CI)
	$(RAY)/bin/python -m pytest tests/test_ray_batch.py -m "not cuda" $(PYTEST_ARGS)

test-trl: $(TRL)/.installed ## trl's trainer, in an environment of its own (not part of CI; needs VIDEOXL_TEST_DATA)
	$(TRL)/bin/python -m pytest tests/test_training_trl.py -m slow $(PYTEST_ARGS)

test-serving: $(SERVING)/.plugin ## the vLLM plug-in, with vLLM on the CPU (3.4 GB, minutes to install; not part of CI)
	$(SERVING)/bin/python -m pytest tests/test_serving_vllm.py $(PYTEST_ARGS)

test-peers: $(PEERS)/.installed ## what is skipped without torchvision, torchcodec and decord (5 GB, minutes to install; not part of CI)
	$(PEERS)/bin/python -m pytest $(PEER_TESTS) $(PYTEST_ARGS)

test-browser: $(VENV)/.page browser ## the demo page in a headless Chromium (Debian's, installed if it lacks)
	$(BIN)/python -m pytest tests/test_demo.py tests/test_demo_browser.py -m "not cuda" $(PYTEST_ARGS)

screenshot: $(VENV)/.page browser ## take the README's picture of the demo page again
	SCREENSHOT=$(CURDIR)/assets/demo_page.png $(BIN)/python -m pytest tests/test_demo_browser.py -m slow -k picture

# What is newest changes from day to day, so there is no file that says it is done.
.PHONY: newest
newest:
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check --upgrade --upgrade-strategy eager -r requirements-newest.txt

# Without the right to install, the tests of the page are skipped and say why.
.PHONY: browser
browser:
	@command -v chromium && command -v chromedriver || \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver) || \
		echo "chromium and chromium-driver are missing and could not be installed; install them as root"

# torchcodec runs with the FFmpeg of the system. Without the right to install, it says so when it is imported.
.PHONY: ffmpeg
ffmpeg:
	@command -v ffmpeg > /dev/null || \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends ffmpeg) || \
		echo "ffmpeg is missing and could not be installed; install it as root"

page: $(VENV)/.page ## serve the demo page, with the bundled checkpoint
	$(BIN)/python -m videoxl.demo $(PAGE_ARGS)

notebook: $(VENV)/.installed ## execute the notebook again and save its outputs
	$(BIN)/python notebooks/execute.py notebooks/quickstart.ipynb

test-without: $(VENV)/.installed ## the tests with each optional package that is installed missing in turn
	set -e; for package in $(OPTIONAL); do $(BIN)/python tests/without.py $$package $(PARALLEL) $(PYTEST_ARGS); done

train-small: $(VENV)/.installed ## train the bundled checkpoint from nothing (hours on two cores; goes on where it stopped)
	$(BIN)/python training/train_small.py --install

evaluate: $(VENV)/.installed ## the bundled checkpoint's results: questions by type and mode, needles in haystacks
	$(BIN)/python evaluation/report.py --clips 24 --seconds 64 --out evaluation/results/report_64s.json
	$(BIN)/python evaluation/report.py --clips 40 --seconds 8 --modes full mask streaming pooled \
		--out evaluation/results/report_8s.json
	$(BIN)/python evaluation/niah.py --kinds single multi_hop ordering counting --out evaluation/results/niah.json

style: $(VENV)/.installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches (not the environments)
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name .venv\* -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: requirements.txt
$(OLDEST)/.installed: requirements-oldest.txt
$(TRL)/.installed: requirements-trl.txt requirements.txt
$(RAY)/.installed: requirements-ray.txt
$(SERVING)/.installed: requirements-serving.txt
$(VENV)/.installed $(OLDEST)/.installed $(RAY)/.installed $(SERVING)/.installed $(TRL)/.installed:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@echo "installing $< into $(@D) (a few minutes on first use)"
	@$(PYTHON) -m venv $(@D)
	@$(call torch_for_a_cpu,$(@D)/bin/python,$<)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

$(PEERS)/.installed: requirements-peers.txt | ffmpeg
	@echo "installing $< into $(@D) (5 GB, a few minutes)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

# Three packages that vLLM asks for do not load beside a torch for CPUs, and nothing here needs them. vLLM finds the
# plug-in where this package is installed; what it runs then is this folder.
$(SERVING)/.plugin: $(SERVING)/.installed pyproject.toml
	@$(SERVING)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(SERVING)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

# What else the page and its tests need, in the same environment.
$(VENV)/.page: requirements-demo.txt $(VENV)/.installed
	@echo "installing $< into $(@D)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r $<
	@$(BIN)/python -m pip install -qqq --disable-pip-version-check --no-deps $$(grep '^pillow==' requirements.txt)
	@touch $@

# Linux's usual torch comes with CUDA: where there is no driver for it, the build without it is taken, if its index is
# reached within seconds (another than the usual one, so for torch alone). Elsewhere there is no such choice.
define torch_for_a_cpu
	if [ "$$(uname)" = Linux ] && ! [ -e /proc/driver/nvidia ] && ! command -v nvidia-smi > /dev/null && \
		! $(1) -c 'import torch' 2> /dev/null; then \
		torch=$$(grep -h '^torch==' $(2) requirements.txt | head -1); \
		if timeout 8 $(1) -c 'import urllib.request; urllib.request.urlopen("$(TORCH_CPU)/torch/", timeout=4)' 2> /dev/null && \
			$(1) -m pip install -qq --disable-pip-version-check --no-deps --index-url $(TORCH_CPU) $$torch; then \
			echo "no NVIDIA driver here: $$torch is PyTorch's build for CPUs (200 MB)"; \
		else \
			echo "no NVIDIA driver here, but $(TORCH_CPU) is not reached: $$torch comes from your usual"; \
			echo "index, which on Linux mostly means 5 GB of CUDA packages. Ctrl-C stops that."; \
		fi; \
	fi
endef
