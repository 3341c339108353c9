# Shared by the scripts beside it; sourced, not run.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=${KUASAR_CACHE:-/var/cache/kuasar-tools}
target=${CARGO_TARGET_DIR:-target}

# The second containerd that end-to-end tests run on; the first is what deps.sh installs or the machine has.
containerd_old=2.1.9
# What `make e2e-kubernetes` runs; in the cache under its version.
kubernetes_version=1.37.2

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# The first x.y.z in what a command prints.
version_in() { grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1 || true; }
# at_least 2.4.2 2.4.0: whether the first version is the second or newer.
at_least() { [ -n "$1" ] && [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# Says what is being done, and how long it took: timed WHAT... -- COMMAND...
timed() {
    local what=() begun=$SECONDS
    while [ "$1" != -- ]; do
        what+=("$1")
        shift
    done
    shift
    say "${KUASAR_STEP:-}${what[*]} ..."
    "$@" || return
    say "${KUASAR_STEP:-}${what[*]}: $((SECONDS - begun)) s"
}
