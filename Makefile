# scope-ebpf: `make` lists what there is to do. V=1 shows the commands.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

Q := $(if $(V),,@)
say = @printf '  %-8s %s\n' '$(1)' '$(2)'

# Run as root, Python would leave bytecode that the owner of the checkout can't delete.
export PYTHONDONTWRITEBYTECODE := 1

PREFIX ?= /usr/local
VENV := .venv
PYTHON := $(VENV)/bin/python
SETUP = LLVM_VERSIONS='$(LLVM_VERSIONS)' CLANG='$(CLANG)' LLVM_STRIP='$(LLVM_STRIP)' scripts/setup.sh
# Under sudo, what is made here still belongs to whoever owns the checkout.
AS_OWNER := scripts/as_owner.sh

# Newest first up to the one that CI uses, then newer ones that may work as well.
LLVM_VERSIONS := 19 18 17 16 15 14 20 21 22
CLANG ?= $(firstword $(wildcard $(addprefix /usr/bin/clang-,$(LLVM_VERSIONS))) clang)
# clang-19 needs llvm-strip-19: an older one may not know all of its output.
LLVM_STRIP ?= $(subst clang,llvm-strip,$(CLANG))

ARCH := $(patsubst aarch64,arm64,$(patsubst x86_64,x86,$(shell uname -m)))
# -g: BTF and CO-RE are made from debug information. -mcpu=v3: the oldest supported kernel, 5.10,
# has it, and the verifier follows its 32-bit jumps better. -Wpadded: a hole in a record would hand
# out uninitialised ring memory.
BPF_CFLAGS := -g -O2 -Wall -Wextra -Wpadded -Werror -mcpu=v3 -target bpf -Iprobes

SOURCES := $(wildcard probes/*.bpf.c)
HEADERS := $(wildcard probes/*.h)
OBJECTS := $(SOURCES:.c=.o)
ARM64_OBJECTS := $(SOURCES:probes/%.bpf.c=build/arm64/%.bpf.o)
GENERATED := scope_ebpf/records.py scope_ebpf/syscall_tables.py

# $(call compile_bpf,ARCH): the source $< becomes the object $@.
define compile_bpf
$(call say,BPF,$@)
$(Q)$(AS_OWNER) mkdir -p $(@D)
$(Q)$(AS_OWNER) $(CLANG) $(BPF_CFLAGS) -D__TARGET_ARCH_$(1) -c $< -o $@
endef

##@ Start here

.PHONY: help
help: ## list these targets
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install what is missing, make .venv, build the BPF objects (a second when done before)
	@$(SETUP)
	@# Another make: the compiler that this one looked for may have been installed just now.
	@$(MAKE) build
	$(call say,READY,$(VENV)/bin/scope-ebpf)

.PHONY: demo
demo: setup ## run the demo shop and trace it (as root)
	@$(PYTHON) examples/shop/demo.py

.PHONY: install
install: ## put scope-ebpf where sudo finds it (as root; PREFIX, DESTDIR)
	@scripts/install.sh install '$(DESTDIR)$(PREFIX)/bin/scope-ebpf'

.PHONY: uninstall
uninstall: ## remove what install put there (as root; PREFIX, DESTDIR)
	@scripts/install.sh uninstall '$(DESTDIR)$(PREFIX)/bin/scope-ebpf'

.PHONY: install-service
install-service: install ## also put scope-ebpf.service there, which records the host always, within a quota
	@scripts/install_service.sh install '$(PREFIX)/bin/scope-ebpf' '$(DESTDIR)/etc/systemd/system'

.PHONY: uninstall-service
uninstall-service: ## remove scope-ebpf.service; its recordings stay
	@scripts/install_service.sh uninstall '$(PREFIX)/bin/scope-ebpf' '$(DESTDIR)/etc/systemd/system'

##@ Build

.PHONY: build
build: $(OBJECTS) ## compile the BPF objects: probes/*.bpf.o
	@: # silences "Nothing to be done"

probes/%.bpf.o: probes/%.bpf.c $(HEADERS) Makefile
	$(call compile_bpf,$(ARCH))
	$(Q)$(AS_OWNER) $(LLVM_STRIP) -g $@

.PHONY: arm64
arm64: $(ARM64_OBJECTS) ## compile the BPF objects for arm64, to see that they do: build/arm64/
	@:

build/arm64/%.bpf.o: probes/%.bpf.c $(HEADERS) Makefile
	$(call compile_bpf,arm64)
	$(Q)$(AS_OWNER) $(LLVM_STRIP) -g $@

# Not stripped, and never loaded: only its BTF is read.
build/records.o: probes/records.c $(HEADERS) Makefile
	$(call compile_bpf,$(ARCH))

.PHONY: generate
generate: $(GENERATED:%=build/generated/%) ## write the generated Python files again
	$(Q)for file in $(GENERATED); do \
		cmp -s build/generated/$$file $$file || $(AS_OWNER) cp build/generated/$$file $$file; \
	done

# Each is made aside first, so that `check` can compare and a failing generator spoils nothing.
build/generated/scope_ebpf/records.py: build/records.o scripts/generate_records.py | $(PYTHON)
	$(call say,GEN,scope_ebpf/records.py)
	$(Q)$(AS_OWNER) mkdir -p $(@D)
	$(Q)$(PYTHON) scripts/generate_records.py $< \
		| $(PYTHON) -m ruff format --stdin-filename $(@F) - | $(AS_OWNER) tee $@ >/dev/null

# Without the kernel headers of x86 the script says so with status 77: keep what is committed.
build/generated/scope_ebpf/syscall_tables.py: scripts/generate_syscalls.py | $(PYTHON)
	$(call say,GEN,scope_ebpf/syscall_tables.py)
	$(Q)$(AS_OWNER) mkdir -p $(@D)
	$(Q){ CC='$(CLANG)' $(PYTHON) $< || { [ $$? -eq 77 ] && cat scope_ebpf/syscall_tables.py; }; } \
		| $(AS_OWNER) tee $@ >/dev/null

##@ Lab

# Only the image needs root; guests run as the owner of the checkout, also under sudo.
LAB = $(AS_OWNER) python3 vagrant/lab.py
KERNEL ?= 6.1
TESTS ?=
LAB_OPTIONS = $(if $(SYSTEMD),--systemd) $(if $(MEMORY),--memory $(MEMORY)) $(if $(TIMEOUT),--timeout $(TIMEOUT))

.PHONY: lab-setup
lab-setup: ## install what the lab needs: QEMU, debootstrap (as root)
	@$(SETUP) --lab

.PHONY: lab-image
lab-image: ## make the disk of the lab's guests, unless it is there (as root)
	@python3 vagrant/lab.py image

.PHONY: lab
lab: build lab-image-if-root ## run tests in a guest (KERNEL=6.1, TESTS='tests/lab/test_kernels.py -k doctor', SYSTEMD=1)
	@$(LAB) run $(KERNEL) $(LAB_OPTIONS) $(TESTS)

.PHONY: lab-all
lab-all: build lab-image-if-root ## run tests on every kernel of the lab; prints what works on which
	@$(LAB) all $(LAB_OPTIONS) $(TESTS)

.PHONY: lab-runner
lab-runner: build lab-image-if-root | $(PYTHON) ## test the runner itself: panics, hangs, two guests at once
	@$(AS_OWNER) $(PYTHON) -m pytest -p no:cacheprovider -m runner tests/runner

.PHONY: lab-image-if-root
lab-image-if-root:
	@[ "$$(id -u)" -ne 0 ] || python3 vagrant/lab.py image

##@ Check

# What needs .venv says so, instead of failing on a missing file.
$(PYTHON):
	@echo 'there is no .venv yet: run make setup' >&2; exit 1

.PHONY: check
check: lint types generated vagrantfile ## what CI runs without root: lint, types, generated files, Vagrantfile, pure and object tests
	@$(MAKE) build
	$(call say,TEST,pure and object)
	$(Q)$(AS_OWNER) $(PYTHON) -m pytest -q -m 'pure or object'

.PHONY: lint
lint: | $(PYTHON)
	$(call say,RUFF,check)
	$(Q)$(AS_OWNER) $(PYTHON) -m ruff check --quiet
	$(call say,RUFF,format)
	$(Q)$(AS_OWNER) $(PYTHON) -m ruff format --check --quiet \
		|| { echo 'some files are not formatted: run $(PYTHON) -m ruff format' >&2; exit 1; }

.PHONY: types
types: | $(PYTHON)
	$(call say,MYPY,strict)
	$(Q)$(AS_OWNER) $(PYTHON) -m mypy --no-error-summary

# Its folder for state would otherwise appear beside the Vagrantfile.
.PHONY: vagrantfile
vagrantfile:
	$(call say,VAGRANT,validate)
	$(Q)if command -v vagrant >/dev/null; then \
		VAGRANT_CWD=vagrant VAGRANT_DOTFILE_PATH='$(CURDIR)/build/vagrant' VAGRANT_HOME='$(CURDIR)/build/vagrant/home' \
			$(AS_OWNER) vagrant validate --ignore-provider >/dev/null; \
	else \
		echo '           skipped: vagrant is not installed (sudo make lab-setup installs it)' >&2; \
	fi

.PHONY: generated
generated: $(GENERATED:%=build/generated/%)
	$(Q)for file in $(GENERATED); do \
		diff -u $$file build/generated/$$file \
			|| { echo "$$file is out of date: run make generate" >&2; exit 1; }; \
	done

# No cache of pytest, for the same reason as no bytecode.
.PHONY: test
test: ## every test but those of the lab (as root; a live test that could run must not be skipped)
	@[ "$$(id -u)" -eq 0 ] || { \
		echo 'cannot run the live tests: they load BPF programs, which takes root;' \
			'run sudo make test, or make check for the others' >&2; exit 1; }
	@$(MAKE) setup
	@$(SETUP) --test
	@SCOPE_EBPF_REQUIRE_LIVE=1 $(PYTHON) -m pytest -p no:cacheprovider -m 'not (lab or runner)'

.PHONY: bench
bench: setup ## measure costs against perf, bpftrace and strace (as root)
	@$(SETUP) --bench
	@$(PYTHON) bench/run.py

.PHONY: clean
clean: ## remove what was built, but not .venv
	$(call say,CLEAN,probes/*.bpf.o build dist caches)
	$(Q)rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	$(Q)rm -f probes/*.bpf.o
	$(Q)find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +
