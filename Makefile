# make run      install, make a demo volume if there is none, serve it
# make check    install, then format, lint, types, tests, package build: the one word before a commit
# make deb      the Debian package
# Slow suites:  make deb-test and make boot-test (as root; want debootstrap, lintian, systemd-container), make soak, make bench, make bench-mount, make bench-invalidation, make bench-tiers, make compliance S3TESTS=... PJDFSTEST=... PJDFSTEST_CRATE=... S3TESTS_PACKAGE=yes

SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
BASE_PYTHON := $(shell test -x /usr/bin/python3 && echo /usr/bin/python3 || command -v python3)
PACKAGES := python3 python3-venv python3-dev gcc pkg-config fuse3 libfuse3-dev rclone restic sqlite3 git fio rsync prometheus systemd

.PHONY: run check install format lint types test build deb deb-test boot-test soak bench bench-mount bench-invalidation bench-tiers compliance clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements-dev.lock pyproject.toml fuse/negotiate.c fuse/negotiate.h fuse/extra_operations.c fuse/locks.c
	@missing=; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
	  DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	@test -x $(PYTHON) || $(if $(BASE_PYTHON),$(BASE_PYTHON),/usr/bin/python3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: install
	@$(PYTHON) bench/demo.py

check: install lint types test build
	@echo "make check: all passed"

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lint: install
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .

types: install
	$(VENV)/bin/mypy

test: install
	$(PYTHON) tests/run_suites.py

build: install
	@rm -rf dist
	$(PYTHON) -m build --no-isolation --outdir dist . >/dev/null
	@ls dist

deb: install
	$(PYTHON) -m deploy.debian.build
	@ls dist/*.deb

deb-test: install
	$(PYTHON) -m deploy.debian.test_package

boot-test: install
	$(PYTHON) -m deploy.debian.test_boot

soak: install
	$(PYTHON) tests/run_suites.py --soak

bench: install
	$(PYTHON) bench/run.py $(if $(RIVALS),--rivals $(RIVALS),)

bench-mount: install
	$(PYTHON) bench/mounts.py $(if $(RIVALS_MOUNTS),--rivals $(RIVALS_MOUNTS),)

bench-invalidation: install
	$(PYTHON) bench/invalidation.py

bench-tiers: install
	$(PYTHON) -m bench.tiers

compliance: install
	$(PYTHON) tests/compliance/run.py $(if $(S3TESTS),--s3tests $(S3TESTS),) $(if $(PJDFSTEST),--pjdfstest $(PJDFSTEST),) $(if $(PJDFSTEST_CRATE),--pjdfstest-crate $(PJDFSTEST_CRATE),) $(if $(S3TESTS_PACKAGE),--s3tests-package,)

clean:
	@! test -d var/mount || chattr -i var/mount  # a mountpoint is immutable, see docs/operations/install.md
	rm -rf $(VENV) dist build var .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
