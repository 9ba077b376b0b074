# Everything runs in .venv, made here. Any Python from 3.11 on: make PYTHON=python3.12 demo
# Another PyTorch than that of constraints.txt, in a place of its own: make VENV=.venv-2.5 TORCH=2.5.0 test (or TORCH=newest)
VENV ?= .venv
BIN := $(VENV)/bin
# Programs of .venv are given to its Python: their first lines name it by a path that may hold blanks, quotes, dollars.
PY := $(BIN)/python
SITE := nbs/_site
PACKAGING := settings.ini setup.py pyproject.toml
VERSIONS := $(if $(TORCH),$(VENV)/constraints-$(TORCH).txt,constraints.txt)
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check

# PyPI's torch for Linux brings CUDA, gigabytes of it. Where there is no NVIDIA driver and PyTorch's own index answers, its CPU build of
# the same version is taken; pip prefers it. (An index given to pip in another way, like a folder of wheels, serves as well.)
TORCH_INDEX := https://download.pytorch.org/whl/cpu
ASK := import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1] + "/torch/", method="HEAD"), timeout=5)
CPU_TORCH = $(shell command -v nvidia-smi >/dev/null || { [ "$$(uname -s)" = Linux ] && $(PY) -c '$(ASK)' $(TORCH_INDEX) 2>/dev/null \
	&& echo --extra-index-url $(TORCH_INDEX); })

# Idle threads spin only briefly before they sleep: beside other work, small networks train several times faster.
export GOMP_SPINCOUNT := 1000
export PIP_RETRIES := 10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test site playground install book lock dist coverage mutants portable clean browser assets

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## compare plain and least-action training on handwritten digits
	@echo "Running lap_compare: about two minutes on two cores"
	$(PY) $(BIN)/lap_compare --force

test: $(VENV)/.installed-dev browser assets ## run every notebook and every test
	LAP_NB_PIP="$(CPU_TORCH)" OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

site: $(VENV)/.installed-dev assets ## build the site into _docs/
	$(PY) $(SITE)/render.py
	@printf 'The site is at %s\n' "$$PWD/_docs/index.html"

playground: $(VENV)/.installed-dev ## serve the playground as an app in the browser, for this machine alone
	$(PY) -m voila nbs/_app/playground.ipynb --Voila.config_file_paths=nbs/_app

install: $(VENV)/.installed-dev ## install everything that development needs into .venv

book: $(VENV)/.installed-dev ## export, run all notebooks, save their outputs, clean, write the README
	$(PY) $(BIN)/nbdev_export
	$(PY) $(SITE)/execute.py
	$(PY) $(BIN)/nbdev_clean
	$(PY) $(SITE)/readme.py

lock: $(VENV)/pyvenv.cfg ## pin what settings.ini asks for, with hashes (UPGRADE=all: in newest versions)
	$(PIP_INSTALL) -c constraints.txt uv
	TORCH=$(TORCH) $(PY) .ci/lock.py $(UPGRADE)

dist: $(VENV)/.installed-dev ## build the sdist and the wheel into dist/
	rm -rf dist
	$(PY) -m build --no-isolation

# Processes that tests and notebooks start are measured too: a .pth file starts coverage in every Python of .venv.
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
coverage: export COVERAGE_PROCESS_START := $(CURDIR)/pyproject.toml
coverage: export LAP_NB_COVERAGE := $(CURDIR)/.coverage
coverage: $(VENV)/.installed-dev browser assets ## measure which lines of lap_nb the notebooks and tests run
	echo 'import coverage; coverage.process_startup()' > "$$($(PY) -c '$(PACKAGES)')/coverage_start.pth"
	$(PY) -m coverage erase
	-OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not install"
	rm -f "$$($(PY) -c '$(PACKAGES)')/coverage_start.pth"
	$(PY) -m coverage combine -q
	$(PY) -m coverage report

mutants: $(VENV)/.installed-dev ## seed faults into three modules and see whether their tests notice
	$(PY) tests/mutants.py

portable: $(VENV)/.installed-dev ## run chapters and tests as on other processors and with other seeds, list assertions with little room
	$(PY) tests/portable.py

clean: ## remove what was built and installed
	rm -rf $(VENV) _proc _docs build dist lap_nb.egg-info .pytest_cache $(SITE)/node_modules
	find lap_nb nbs tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.11 or later was found: install one (Debian: apt-get install python3 python3-venv)" \
	  "or name one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1

# What another PyTorch may ask for in other versions is left to it.
$(VENV)/constraints-$(TORCH).txt: constraints.txt | $(VENV)/pyvenv.cfg
	@sed -E '/^(torch|sympy|triton|nvidia-[^=]*|cuda-[^=]*)==/d' $< > $@
	@[ '$(TORCH)' = newest ] || echo 'torch==$(TORCH)' >> $@

$(VENV)/.installed: $(PACKAGING) $(VERSIONS) | $(VENV)/pyvenv.cfg
	@echo "Installing lap_nb and what it requires into $(VENV): about a minute"
	@$(PIP_INSTALL) -c $(VERSIONS) setuptools
	@$(PIP_INSTALL) -c $(VERSIONS) $(CPU_TORCH) --no-build-isolation -e '.[lab]'
	@touch $@

# All but torch comes in files whose hashes stand in the lock, and nothing is built but lap_nb.
$(VENV)/.installed-dev: $(PACKAGING) $(VERSIONS) requirements.lock | $(VENV)/pyvenv.cfg
	@echo "Installing lap_nb with its development tools into $(VENV): about two minutes"
	@$(PIP_INSTALL) --require-hashes --no-deps --only-binary :all: -r requirements.lock
	@$(PIP_INSTALL) -c $(VERSIONS) $(CPU_TORCH) torch
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $(VENV)/.installed $@

# What the browser tests and the site need from outside Python. Where it cannot be had, make goes on: the tests that
# need it are skipped and say so.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	as_root=; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
	echo "Installing Chromium for the browser tests: about half a minute"; \
	export DEBIAN_FRONTEND=noninteractive; \
	{ $$as_root apt-get update -qq && $$as_root apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
	|| echo "Chromium could not be installed, the browser tests will be skipped: try 'sudo apt-get install chromium'"

assets: $(SITE)/node_modules/.installed
$(SITE)/node_modules/.installed: $(SITE)/package.json $(SITE)/package-lock.json
	@echo "Installing the site's scripts and fonts with npm"
	@if npm ci --ignore-scripts --no-audit --no-fund --silent --prefix $(SITE); then touch $@; \
	else echo "npm could not install them, the site tests will be skipped: is Node.js with npm installed?"; fi
