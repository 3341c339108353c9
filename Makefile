# Everything that can be done with a checkout. `make help` lists it. Each target works alone on a fresh clone.

SHELL := /bin/bash
CARGO ?= cargo
# Where deps puts the tools it builds, outside the checkout.
export KUASAR_CACHE ?= /var/cache/kuasar-tools
# Which kernel guest builds and install installs: cloud, the distribution's; mini, a small one, built in some minutes. Where
# KUASAR_GUEST_KERNEL names one, that.
KERNEL ?= $(if $(KUASAR_GUEST_KERNEL),own,cloud)
GUEST := $(or $(KUASAR_GUEST_DIR),$(KUASAR_CACHE)/guest)/$(KERNEL)
# Which sandboxer conformance and bench are about.
export SANDBOXER ?= kuasar-runc
# Debian's suite that a node in a virtual machine is of: trixie or bookworm.
export SUITE ?= trixie
export KUBERNETES_LONG
# What node-shell runs instead of a terminal.
export NODE_RUN
# Which sandboxers the demo shows beside those that it always does.
export WITH ?=

TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
SYSCONFDIR ?= /etc
GUESTDIR ?= $(PREFIX)/share/kuasar/guest
# kuasard finds it from its own place: ../libexec/kuasar beside BINDIR.
LIBEXECDIR ?= $(patsubst %/,%,$(dir $(BINDIR)))/libexec/kuasar
CRUN := $(or $(KUASAR_GUEST_CRUN),$(KUASAR_CACHE)/bin/crun)
UNITDIR ?= $(PREFIX)/lib/systemd/system
# Manual pages and completions.
SHAREDIR ?= $(PREFIX)/share
# One name of the shim per sandboxer: containerd derives it from runtime_type. Those that the documentation names, and those that are
# configured.
SHIMS := kuasar-runc kuasar-crun kuasar-qemu
CONFIGURED = $(RELEASE)/kuasarctl --config $(DESTDIR)$(SYSCONFDIR)/kuasar/config.toml config | sed -n 's/^\[sandboxer\.\([a-z0-9-]*\)\]$$/\1/p'

.DEFAULT_GOAL := help
.PHONY: help deps build guest demo test check e2e e2e-kubernetes conformance chaos fuzz bench bench-vmm node node-debs node-shell node-test install install-built deb deb-test clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install what building and testing need, only what is missing
	@scripts/deps.sh all

# The agent is a static program; scripts/guest.sh builds it and crun.
build: ## Build the daemon, its tools, the test programs (release) and the guest
	@scripts/deps.sh build
	@$(CARGO) build --quiet --release --locked --workspace --exclude kuasar-guest-agent --bins
	@scripts/guest.sh $(KERNEL)

guest: ## Build what microVMs boot, with KERNEL=cloud or KERNEL=mini; UPDATE=1 for newer packages
	@scripts/deps.sh build
	@scripts/guest.sh $(KERNEL)

demo: ## Run a pod in each sandboxer beside the runc shim, building only what that needs; WITH=a,b for more sandboxers
	@scripts/demo.sh $(KERNEL)

test: build ## check, the guest, packages, end-to-end tests, conformance, chaos and a node with systemd, with a summary
	@scripts/deps.sh all
	@NODE_PART=$${NODE_PART-fast} scripts/test.sh check guest deb e2e conformance chaos node

check: ## Format, lints, unit tests, licences and advisories
	@scripts/deps.sh check
	@scripts/test.sh check

e2e: build ## End-to-end tests on each containerd there is
	@scripts/deps.sh e2e
	@scripts/test.sh e2e

e2e-kubernetes: build ## Pods of a Kubernetes on this machine, with each handler beside the runc shim; KUBERNETES_LONG=1 for the long forms
	@scripts/deps.sh kubernetes
	@scripts/test.sh kubernetes

conformance: build ## critest with SANDBOXER=kuasar-runc or kuasar-qemu, compared with the runc shim
	@scripts/deps.sh conformance
	@scripts/test.sh conformance

chaos: build ## Kill daemons at random under load, CHAOS_MINUTES long; nobody may notice
	@scripts/deps.sh run
	@$(RELEASE)/kuasar-chaos --kills 200 --out $(TARGET)/chaos

fuzz: ## Fuzz what reads guests' and hosts' words, FUZZ_SECONDS (60) for each target
	@scripts/deps.sh build
	@scripts/fuzz.sh

bench: build ## Compare SANDBOXER with the runc shim; BENCH_QUICK=1 for a minute's worth
	@scripts/deps.sh run
	@$(RELEASE)/kuasar-bench

bench-vmm: build ## Compare virtual machines with ones booted by hand; BENCH_QUICK=1 for two minutes' worth
	@scripts/deps.sh run
	@SANDBOXER=kuasar-qemu $(RELEASE)/kuasar-bench

node: ## Build the image of a Debian node with systemd, SUITE=trixie or bookworm; UPDATE=1 for newer packages
	@scripts/deps.sh image
	@scripts/node.sh $(SUITE)

# What is put into the node: the packages, kuasar in a newer version, and in one that does not work.
node-debs: build
	@scripts/deps.sh deb
	@scripts/deb-versions.sh $(TARGET)/node-debs $(KERNEL)

node-shell: node node-debs ## A terminal in such a node, with containerd and kuasard; NODE_RUN='command' for a command instead
	@scripts/deps.sh node
	@$(RELEASE)/kuasar-node --packages $(TARGET)/node-debs $(if $(NODE_RUN),exec "$$NODE_RUN",shell)

node-test: build ## Tests in such a node: packages, systemd, cgroup v2, AppArmor, KVM; NODE_PART=fast for those of make test
	@scripts/test.sh node

install: build ## Install into DESTDIR and PREFIX: programs, crun, shim names, guest, configuration, systemd unit
	@$(MAKE) --no-print-directory install-built

install-built:
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBEXECDIR) $(DESTDIR)$(SYSCONFDIR)/kuasar/conf.d $(DESTDIR)$(UNITDIR) $(DESTDIR)$(GUESTDIR)
	install -m 755 $(RELEASE)/kuasard $(RELEASE)/kuasarctl $(RELEASE)/containerd-shim-kuasar-v1 $(DESTDIR)$(BINDIR)/
	install -m 755 $(CRUN) $(DESTDIR)$(LIBEXECDIR)/crun
	install -m 644 $(GUEST)/vmlinuz $(GUEST)/initrd $(GUEST)/initrd-debug $(DESTDIR)$(GUESTDIR)/
	test -e $(DESTDIR)$(SYSCONFDIR)/kuasar/config.toml || { \
		sed 's|/usr/local/share/kuasar/guest|$(GUESTDIR)|' packaging/config.toml > $(DESTDIR)$(SYSCONFDIR)/kuasar/config.toml && \
		chmod 644 $(DESTDIR)$(SYSCONFDIR)/kuasar/config.toml; }
	set -o pipefail; configured=$$($(CONFIGURED)) || echo "links for these alone: $(SHIMS)" >&2; for name in $(SHIMS) $$configured; do \
		ln -sf containerd-shim-kuasar-v1 $(DESTDIR)$(BINDIR)/containerd-shim-$$name-v1; done
	sed 's|@BINDIR@|$(BINDIR)|; s|@SYSCONFDIR@|$(SYSCONFDIR)|' packaging/kuasard.service.in > $(DESTDIR)$(UNITDIR)/kuasard.service
	chmod 644 $(DESTDIR)$(UNITDIR)/kuasard.service
	$(RELEASE)/kuasarctl share $(DESTDIR)$(SHAREDIR)

deb: build ## Build Debian packages into target/deb: kuasar, kuasar-crun, kuasar-guest
	@scripts/deps.sh deb
	@scripts/deb.sh $(KERNEL)

deb-test: build ## Install, upgrade, remove and purge the packages in a Debian of their own, and look into them
	@scripts/deps.sh deb
	@scripts/test.sh deb

clean: ## Remove what building has made, and what killed tests have left on the machine
	@if [ -x $(RELEASE)/kuasar-sweep ]; then $(RELEASE)/kuasar-sweep --kept; fi
	@$(CARGO) clean --quiet
