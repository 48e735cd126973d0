# From a bare checkout to a running model. Needs make and Python 3.12 or newer, nothing else; `make help` lists the targets.
#
# Every target first brings .venv up to date, which does nothing unless pyproject.toml or constraints.txt changed:
# the file .venv/.installed-EXTRAS remembers the last installation. All paths are relative, so the checkout's own
# path may contain spaces.

VENV := .venv
RUN := $(VENV)/bin/python
# Optional dependency groups of pyproject.toml, joined by commas; empty means what the target needs.
EXTRAS ?=
# More arguments for pytest: make test PYTEST_ARGS="tests/test_packaging.py -x"
PYTEST_ARGS ?=

# The tested version first. A name can exist and still not run (a pyenv shim without its version), so each one is asked.
CANDIDATES := $(or $(PYTHON),python3.12 python3.13 python3.14 python3 python)
ASK := import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 12))
find_python = $(shell for name in $(CANDIDATES); do \
	"$$name" -c '$(ASK)' >/dev/null 2>&1 && { echo "$$name"; break; }; done)
too_old = $(shell for name in $(CANDIDATES); do \
	version=$$("$$name" -c '$(ASK)' 2>/dev/null); [ -z "$$version" ] || echo "$$name is $$version;"; done)

test_env := $(VENV)/.installed-$(or $(EXTRAS),test)
every_extra := test,offline-gpu
test_all_env := $(VENV)/.installed-$(or $(EXTRAS),$(every_extra))
demo_env := $(VENV)/.installed-$(or $(EXTRAS),demo)

.NOTPARALLEL: # two installations into one environment at once would break it
.DELETE_ON_ERROR:
.PHONY: help demo test test-all mutate lint format types wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name what; do printf '  make %-9s %s\n' "$$name" "$$what"; done

demo: $(demo_env) ## load a real model as FP8 with both schemes, generate, and compare with BF16
	@echo "==> running the demo (results go to demo_output/)"
	@$(RUN) scripts/demo.py

test: $(test_env) ## run the tests: a few minutes, every kind of case
	@echo "==> running the tests"
	@$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

test-all: $(test_all_env) ## run every test, compilations for GPUs that are not here included
	@echo "==> running all tests"
	@$(RUN) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

mutate: $(test_env) ## plant faults in copies of the library and see that a test catches each
	@echo "==> planting faults"
	@$(RUN) scripts/mutate.py

lint: $(test_env) ## check style and formatting
	@echo "==> checking style and formatting"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(test_env) ## format the code in place
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

types: $(test_env) ## check the types
	@echo "==> checking types"
	@$(RUN) -m pyright --pythonpath $(RUN)

# `build/` is emptied because setuptools would put modules that no longer exist from there into the wheel.
wheel: $(test_env) ## build dist/fp8jax-*.whl
	@echo "==> building the wheel into dist/"
	@rm -rf build dist
	@$(RUN) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@rm -rf build
	@ls dist

clean: ## remove .venv, build results and caches (downloaded models stay)
	@echo "==> removing .venv, build results and caches"
	@rm -rf .venv .venv-* build dist *.egg-info demo_output .pytest_cache .hypothesis .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	$(eval INTERPRETER := $(find_python))
	$(if $(INTERPRETER),,$(error fp8jax needs Python 3.12 or newer; found: $(or $(too_old),no Python that runs;) install one, or name it: make PYTHON=/path/to/python3.12))
	@echo "==> creating $(VENV) with $(INTERPRETER)"
	@$(INTERPRETER) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# The environment is a real prerequisite: when its interpreter has vanished, it is made and filled again.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(RUN)
	@echo "==> installing fp8jax with [$*] into $(VENV) (the first time this takes some minutes)"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip
	@$(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[$*]'
	@touch '$@'
