#!/usr/bin/env bash
# Runs groups of stages, then sums up: scripts/test.sh check|guest|deb|e2e|kubernetes|conformance|chaos|node...
# Every stage runs, whatever became of the one before it.
. "$(dirname "$0")/lib.sh"

export PATH=$cache/bin:$PATH
export CARGO_TERM_PROGRESS_WHEN=never
bin=$(realpath -m "$target")/release
stages=()

# Daemons that an interrupted test has left behind.
sweep() { [ ! -x "$bin/kuasar-sweep" ] || "$bin/kuasar-sweep"; }
trap sweep EXIT
trap 'exit 130' INT TERM

# Stages run as processes of their own, and some are functions of this script.
stage() {
    local name=$1
    shift
    stages+=("$name")
    if [ "$(type -t "$1")" = function ]; then
        scripts/stage.sh "$name" bash -euo pipefail -c '"$@"' stage "$@" || true
    else
        scripts/stage.sh "$name" "$@" || true
    fi
}

# Always of the whole workspace: of some packages cargo would choose other features of what they share, and build that again.
unit_tests() {
    cargo test --quiet --locked --workspace --no-run
    cargo test --locked --workspace
}

clippy() {
    cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
    cargo clippy --quiet --locked --workspace --test demo --test e2e --test harness --test kubernetes --test node -- -D warnings
}

deny() {
    cargo deny --log-level error check licenses bans sources
    if cargo deny --log-level error fetch db; then
        cargo deny --log-level error check advisories
    else
        say "SKIP advisories: the advisory database could not be fetched" | tee -a "$KUASAR_SKIP_LOG"
        say "PASSED 1" >"$KUASAR_RESULTS"
    fi
}

end_to_end() {
    cargo test --quiet --locked --workspace --no-run --test harness --test e2e --test demo
    KUASAR_BIN_DIR=$bin KUASAR_CONTAINERD=$1 cargo test --locked --workspace --test harness --test e2e --test demo --no-fail-fast
}

missing_containerd() {
    say "SKIP e2e on containerd $1: not in $cache (make deps builds it where there is Go)" | tee -a "$KUASAR_SKIP_LOG"
}

e2e() {
    local first=${KUASAR_CONTAINERD:-} old=$cache/containerd-$containerd_old/bin/containerd version
    [ -n "$first" ] || { [ -x "$cache/bin/containerd" ] && first=$cache/bin/containerd; } || first=$(command -v containerd)
    version=$("$first" --version | version_in)
    stage "e2e-containerd-$version" end_to_end "$first"
    if [ -x "$old" ]; then
        stage "e2e-containerd-$containerd_old" end_to_end "$old"
    else
        stage "e2e-containerd-$containerd_old" missing_containerd "$containerd_old"
    fi
    stage e2e-machines machines "$first"
}

# Pods in virtual machines, which may have to be emulated: few at a time, and without what is about daemons and not about pods, but for
# the death of a worker, also under machines that are started at once: twenty of the small kernel's (make guest KERNEL=mini). The
# distribution's takes too long to boot in so many, where it is emulated and the worker's death has half of them started anew.
machines() {
    local without=(--skip streaming --skip daemon:: --skip upgrade:: --skip gc:: --skip bad:: --skip soak::)
    export KUASAR_E2E_HANDLERS=kuasar-qemu KUASAR_BIN_DIR=$bin KUASAR_CONTAINERD=$1
    cargo test --locked --workspace --test e2e --no-fail-fast -- --test-threads 3 "${without[@]}"
    cargo test --locked --workspace --test e2e --no-fail-fast -- kuasar-qemu/daemon::the_worker_is_killed
    [ ! -e "$cache/guest/mini/vmlinuz" ] || export KUASAR_E2E_MACHINES=20
    cargo test --locked --workspace --test e2e --no-fail-fast -- kuasar-qemu/soak::pods_at_once
}

# Longer than all of the others together, so not part of them.
kubernetes() {
    local -x STAGE_TIMEOUT=${STAGE_TIMEOUT:-7200}
    stage kubernetes kubernetes_of
}

kubernetes_of() {
    cargo test --quiet --locked --workspace --no-run --test kubernetes
    KUASAR_BIN_DIR=$bin KUASAR_KUBERNETES=$cache/kubernetes-$kubernetes_version KUASAR_KUBERNETES_OUT=$(realpath "$target")/kubernetes \
        KUASAR_KUBERNETES_LONG=${KUBERNETES_LONG:-} cargo test --locked --workspace --test kubernetes
}

conformance() {
    local sandboxer=${SANDBOXER:-kuasar-runc}
    # A hundred machines one after the other, which may have to be emulated.
    [ "$sandboxer" = kuasar-runc ] || local -x STAGE_TIMEOUT=${STAGE_TIMEOUT:-3600}
    stage "conformance-$sandboxer" conformance_of "$sandboxer"
}

conformance_of() {
    KUASAR_BIN_DIR=$bin "$bin/kuasar-conformance" --sandboxer "$1" --out "$target/conformance" --results "$KUASAR_RESULTS"
}

# Some minutes of it; `make chaos` is the long form.
chaos() { stage "chaos-${SANDBOXER:-kuasar-runc}" chaos_of "${SANDBOXER:-kuasar-runc}"; }

chaos_of() {
    local quick=(--minutes 0.5 --pods 5 --containers 20 --serving-pods 15 --serving-kills 8 --upgrades 6)
    quick+=(--hung-phases 4 --hung-lives 13)
    KUASAR_BIN_DIR=$bin "$bin/kuasar-chaos" --sandboxer "$1" "${quick[@]}" --out "$target/chaos" --results "$KUASAR_RESULTS"
}

# In a virtual machine with systemd, of Debian's suite SUITE; with NODE_PART=fast only what takes minutes. What it needs is made here, so that what cannot be made is a failure of this
# stage alone.
node() {
    # Forty restarts, critest and a virtual machine within the machine.
    [ "${NODE_PART:-}" = fast ] || local -x STAGE_TIMEOUT=${STAGE_TIMEOUT:-5400}
    stage "node-${SUITE:-trixie}" node_of "${SUITE:-trixie}"
}

node_of() {
    scripts/deps.sh node
    scripts/node.sh "$1"
    make --silent --no-print-directory --old-file=build node-debs
    cargo test --quiet --locked --workspace --no-run --test node
    SUITE=$1 KUASAR_NODE_PACKAGES=$(realpath "$target")/node-debs cargo test --locked --workspace --test node
}

check() {
    stage fmt cargo fmt --all --check -- --color never
    stage clippy clippy
    stage unit unit_tests
    stage deny deny
}

guest() { stage guest scripts/guest-test.sh; }
deb() { stage deb scripts/deb-test.sh; }

export cache target bin kubernetes_version
export -f say clippy unit_tests deny end_to_end missing_containerd machines kubernetes_of conformance_of chaos_of node_of
for group in "$@"; do
    case $group in
    check | guest | deb | e2e | kubernetes | conformance | chaos | node) $group ;;
    *) fail "no group $group: check, guest, deb, e2e, kubernetes, conformance, chaos, node" ;;
    esac
done
scripts/summary.sh "${stages[@]}"
