# A newcomer needs nothing before `make demo` and `make test`: they find a Python 3.8 to 3.11 (PYTHON=/path/to/it names
# one), make .venv and install what is missing. `make test` compiles Horovod too, once.

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
VENV := .venv
BIN := $(VENV)/bin
ONEDNN := $(shell grep -o 'onednn-devel[^"]*' pyproject.toml)
LINT := build/lint
FAULTS := build/faults.jsonl
LINTERS := $(shell grep -oE "'(ruff|mypy|clang-format|numpy|pydantic|pillow)==[^']*'" setup.py)
HOROVOD := $(shell grep -o 'horovod==[0-9.]*' setup.py | cut -d= -f3)
comma := ,
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test coverage soak lint sanitize bench docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/base  # pre-trains a small ViT on handwritten digits, with 2 workers and a parameter server; then few labels
	$(BIN)/python tools/launch.py -n 2 -s 1 -- $(BIN)/mxsimmim pretrain conf/digits.yaml
	@echo '==> Does it help? Classifiers with 10 labels a class, with this encoder and without'
	$(BIN)/python -W ignore tools/few_labels.py runs/digits

test: $(VENV)/test  # runs every test: three at a time, as jobs mostly wait, then one by one those that measure time or memory
	$(run_tests)

# `make test`, then each line of mxsimmim/ that it has not run, in any process; fails below 90 %
coverage: export COVERAGE_PROCESS_START := $(CURDIR)/pyproject.toml
coverage: export COVERAGE_FILE := $(CURDIR)/build/coverage/data
coverage: $(VENV)/test
	@rm -rf build/coverage && mkdir -p build/coverage
	@echo "import os; 'COVERAGE_PROCESS_START' in os.environ and" \
		"exec(open('$(CURDIR)/tests/support/measuring.py').read(), {})" > \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/measured.pth"
	$(run_tests)
	@env -u COVERAGE_PROCESS_START $(BIN)/coverage combine -q
	@env -u COVERAGE_PROCESS_START $(BIN)/coverage report

define run_tests
	@status=0; \
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not alone' || status=$$?; \
	env -u COVERAGE_PROCESS_START $(BIN)/python -m pytest -m alone $$(grep -rlI mark.alone tests) || status=$$?; \
	exit $$status
endef

soak: $(VENV)/test  # jobs that run long, jobs that are killed again and again, a hundred faults, commands that fail
	$(BIN)/python -m pytest -v tests/*/soak_*.py
	@mkdir -p build && rm -f $(FAULTS) && touch $(FAULTS)
	@status=0; \
	SOAK=1 FAULT_RECORDS=$(CURDIR)/$(FAULTS) $(BIN)/python -m pytest -v -m soak || status=$$?; \
	echo '==> What became of jobs under faults'; \
	$(BIN)/python tests/support/faults.py $(FAULTS); \
	exit $$status

lint: $(LINT)/ready  # checks style and types
	$(LINT)/bin/ruff check .
	$(LINT)/bin/mypy
	$(LINT)/bin/clang-format --dry-run -Werror mxsimmim/ops/src/*

sanitize: $(VENV)/test  # runs the tests of the native operators under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BIN)/python tools/sanitize.py tests/unit/test_ops*.py tests/unit/test_transforms.py

bench: $(VENV)/bench  # measures speed beside PyTorch
	$(BIN)/python tools/bench/train.py -o step.png
	$(BIN)/python tools/bench/product.py
	$(BIN)/python tools/bench/breakdown.py
	$(BIN)/python tools/bench/detect.py
	$(BIN)/python tools/bench/data.py
	$(BIN)/python tools/bench/startup.py
	$(BIN)/python tools/bench/scale.py
	$(BIN)/python tools/bench/parallel.py
	$(BIN)/python tools/bench/timeline.py -o timeline.png
	$(BIN)/python tools/bench/allreduce.py allreduce.png
	$(BIN)/python tools/bench/plan.py  # the last, as it fails where a prediction is far off

docs: $(VENV)/docs  # builds the documentation into build/site; a broken link or name fails (with -q none would)
	$(BIN)/mkdocs build --strict
	@echo '==> build/site/index.html'

clean:  # removes what was installed and built, keeps runs/
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache mxsimmim/ops/libmxsimmim.*
	find . -name __pycache__ -prune -exec rm -rf {} +

# Half a package looks whole to the next pip. So `whole`, which names the folder it was installed for, is away while pip
# works; where it is away or names another folder at the start, the installation begins anew.
ifneq ($(shell test -x $(BIN)/python && cat $(VENV)/whole 2> /dev/null),$(CURDIR))
ANEW := yes
.PHONY: $(VENV)/base
endif

# $(call install,ARGUMENTS): pip, showing of all its output what it downloads.
define install
	@rm -f $(VENV)/whole
	@$(BIN)/python -m pip install --progress-bar off $(1) \
		| sed -un 's/^ *Downloading \(.*\)/    \1/p; s/^ *Using cached \(.*\)/    \1, cached/p'
	@echo '$(CURDIR)' > $(VENV)/whole
endef

$(VENV)/base: setup.py pyproject.toml $(wildcard mxsimmim/ops/build.py mxsimmim/ops/src/*)
	@if [ '$(ANEW)' ]; then \
		python=$$(tools/find_python.sh); \
		echo "==> Making $(VENV) with $$("$$python" --version), $$python"; \
		rm -rf $(VENV); "$$python" -m venv $(VENV); \
		$(BIN)/python -m pip install -q pip==25.0.1 setuptools==75.3.2 wheel==0.45.1; \
	fi
	@echo '==> Installing mxsimmim and what it needs, compiling its operators (290 MB to download, about a minute)'
	$(call install,"$(ONEDNN)")
	$(call install,--no-build-isolation -e .)
	@$(BIN)/python -c 'from mxsimmim.ops import library; print("    operators:", library.status())'
	@touch $@

$(VENV)/test: $(VENV)/base $(VENV)/horovod-$(HOROVOD)
	@echo '==> Installing what the tests need'
	$(call install,--no-build-isolation --find-links $(VENV)/horovod-$(HOROVOD) -e '.[test$(comma)horovod]')
	@touch $@

# Horovod has no wheel. Its build looks for the installed mxnet (hence no isolation), CMake 4 refuses the files of its
# third parties, and GCC 13 no longer includes <cstdint> for them. pip's cache is off: it may hold a build without MXNet.
$(VENV)/horovod-$(HOROVOD): | $(VENV)/base
	@command -v "$${CXX:-c++}" g++ clang++ > /dev/null || { \
		echo 'Horovod must be compiled, and no C++ compiler is on PATH (c++, g++, clang++).' \
			'On Debian or Ubuntu: sudo apt-get install g++' >&2; exit 1; }
	@echo '==> Compiling Horovod $(HOROVOD) (once, 1 to 3 minutes)'
	$(call install,cmake==3.31.10 cloudpickle psutil packaging)
	@rm -rf $@.part
	@env -u MAKELEVEL MAKEFLAGS=-j$$(nproc) HOROVOD_CMAKE='$(CURDIR)/$(BIN)/cmake' CXXFLAGS='-include cstdint' \
		CMAKE_TOOLCHAIN_FILE='$(CURDIR)/tools/horovod.cmake' \
		HOROVOD_WITH_MXNET=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 \
		HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
		$(BIN)/python -m pip wheel -q --no-cache-dir --no-build-isolation --no-deps -w $@.part horovod==$(HOROVOD)
	@mv $@.part $@

# Linters, and what they read types of, apart from everything else: nothing need be compiled before it is checked.
$(LINT)/ready: setup.py
	@echo '==> Installing linters (60 MB to download)'
	@python=$$(tools/find_python.sh); "$$python" -m venv --clear $(LINT)
	@$(LINT)/bin/python -m pip install -q $(LINTERS)
	@touch $@

$(VENV)/bench: $(VENV)/test
	@echo '==> Installing PyTorch to compare with'
	$(call install,--no-build-isolation -e '.[bench]')
	@touch $@

$(VENV)/docs: $(VENV)/base
	@echo '==> Installing what builds the documentation'
	$(call install,--no-build-isolation -e '.[docs]')
	@touch $@
