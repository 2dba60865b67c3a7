# `make demo` and `make test` do everything, set-up included. The other targets are their parts.

PYTHON ?= $(shell tools/python)
VENV := .venv
BIN := $(VENV)/bin
LOOM_TARGET := $(or $(CARGO_TARGET_DIR),target)/loom
FUZZ_TARGET := $(or $(CARGO_TARGET_DIR),target)/fuzz
# Seconds a target, and which targets: all, when none is named.
FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?=
FUZZ := PYTHONPATH=fuzz:tests $(BIN)/python -m harness
RUST_SOURCES := Cargo.toml Cargo.lock pyproject.toml $(shell find crates -name '*.rs' -o -name Cargo.toml)
STAMPS := $(VENV)/stamps
# mkfs.ext4 and e2fsck are there for everybody, but not on everybody's PATH.
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: demo test soak soak-short fuzz fuzz-short fuzz-input fuzz-lint bench-page setup build lint rust loom pytest test-unprivileged dist fmt clean

demo: build
	$(BIN)/vbus demo

test: build
	tools/steps soak-short\& lint rust fuzz-lint fuzz-short loom test-unprivileged pytest

soak: build
	VBUS_SOAK_SECONDS=3600 $(BIN)/python -m pytest tests/test_soak.py --timeout 4200 -s

# Three minutes of it: tools/steps runs it beside the others.
soak-short:
	$(BIN)/python -m pytest tests/test_soak.py --timeout 400 --quiet --no-header -s

fuzz: build
	$(FUZZ) --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

# A while of each: tools/steps runs it.
fuzz-short: build
	$(FUZZ) --seconds 20

# An input that was found, again.
fuzz-input: build
	$(FUZZ) --input $(INPUT)

fuzz-lint: build
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --manifest-path fuzz/Cargo.toml --target-dir $(FUZZ_TARGET) --no-default-features --all-targets --release \
		--locked --quiet -- -D warnings

# The pages of benchmarks, from the figures that are committed beside them.
bench-page: build
	$(BIN)/vbus bench report docs/benchmarks --output docs/benchmarks.md
	$(BIN)/vbus bench report docs/exits --output docs/exits.md

setup: $(STAMPS)/system $(STAMPS)/python

# What the machine must have: said before it is installed, or only said where that cannot be done.
$(STAMPS)/system: tools/system tools/qemu
	tools/system
	tools/qemu
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/python: pyproject.toml tools/python tools/requirements | $(STAMPS)/system
	@echo "setup: a virtual environment in $(VENV), with what the tests need"
	$(PYTHON) -m venv $(VENV)
	tools/requirements | $(BIN)/pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	@mkdir -p $(STAMPS) && touch $@

build: $(STAMPS)/build

$(STAMPS)/build: $(RUST_SOURCES) $(STAMPS)/python
	@echo "build: the native core (release)"
	PIP_QUIET=1 VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --quiet
	@touch $@

lint: build
	cargo fmt --check
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest vbus._core --allowlist tools/stubtest-allowlist
	$(BIN)/lint-imports

rust: build
	cargo clippy --workspace --all-targets --release --quiet -- -D warnings
	cargo test --profile tested --quiet -p vbus-ring -p vbus-engine -p vbus-bench

loom:
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$(LOOM_TARGET) cargo test --profile tested --quiet -p vbus-ring --test loom_event --test loom_link

pytest: build
	$(BIN)/python -m pytest --ignore tests/test_soak.py

# What needs no rights, as a user who has none, from a wheel outside this checkout.
test-unprivileged: build
	tools/unprivileged

dist: build
	$(BIN)/maturin build --release --quiet --out dist
	$(BIN)/maturin sdist --out dist

fmt:
	cargo fmt
	cargo fmt --manifest-path fuzz/Cargo.toml
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

clean:
	rm -rf target $(VENV) dist
	find python -name '*.so' -delete
