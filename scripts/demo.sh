#!/usr/bin/env bash
# Builds what the demo needs and nothing else, several things at a time, and runs it: scripts/demo.sh [KERNEL]
#
#   packages ─┬▶ containerd ▶ runc ▶ CNI plugins ▶ crun             (Go, C)
#             ├▶ kuasard, kuasarctl, the shim, the demo             (Rust)
#             └▶ QEMU ▶ the guest ▶ virtiofsd ▶ vhost-device-vsock  (what virtual machines need)
#
# WITH names sandboxers to show beside those that are always shown, separated by commas.
. "$(dirname "$0")/lib.sh"

kernel=${1:-cloud}
always=(kuasar-runc kuasar-crun kuasar-qemu)
# Those that WITH can add.
more=()

programs=(kuasard kuasarctl containerd-shim-kuasar-v1 kuasar-demo)
steps=10
# How often to say what is still being done, in seconds.
interval=30

running=$(mktemp -d)
groups=()

# Each lane is a process group of its own, which ends as a whole.
stop() {
    local group
    for group in "${groups[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
    rm -rf "$running"
}
trap stop EXIT
trap 'exit 130' INT TERM

check_with() {
    local name known names
    known=" ${always[*]} ${more[*]} "
    IFS=, read -ra names <<<"${WITH:-}"
    for name in "${names[@]// /}"; do
        [[ $known == *" kuasar-$name "* || $known == *" $name "* ]] || {
            local choice="and there is nothing to add to them yet"
            [ ${#more[@]} -eq 0 ] || choice="and WITH can add ${more[*]}"
            fail "WITH=$WITH: there is no sandboxer $name: ${always[*]} are always shown, $choice"
        }
    done
}

# A step of a lane: step NUMBER WHAT COMMAND... What it prints has its number before it; while it runs, a file says since when.
step() {
    local number=$1 what=$2 status=0
    shift 2
    say "$SECONDS $what" >"$running/$number"
    KUASAR_STEP="[$number/$steps] " "$@" || status=$?
    rm -f "$running/$number"
    return "$status"
}

deps() { scripts/deps.sh "$@"; }

compile() {
    local arguments=() program
    for program in "${programs[@]}"; do arguments+=(--bin "$program"); done
    cargo build --quiet --release --locked -p kuasar-shim -p kuasar-tests "${arguments[@]}"
}

lane_go() {
    step 2 containerd deps install_containerd
    step 3 runc deps install_runc
    step 4 "CNI plugins" deps install_cni
    step 10 crun timed building crun -- deps install_crun || say "  the demo goes on without crun" >&2
}

lane_rust() { step 5 "kuasard and the demo" timed building "${programs[*]}" -- compile; }

lane_machines() {
    step 6 QEMU deps packages_node
    step 7 "the guest" timed building "the guest: its kernel, OCI runtime and agent" -- scripts/guest.sh "$kernel"
    step 8 virtiofsd deps install_virtiofsd
    # Most machines have the kernel's own device.
    [ -e /dev/vhost-vsock ] || step 9 vhost-device-vsock deps install_vhost_device_vsock
}

progress() {
    local file begun what all
    while sleep "$interval"; do
        all=
        for file in "$running"/*; do
            { read -r begun what <"$file"; } 2>/dev/null || continue
            all+="${all:+, }$what for $((SECONDS - begun)) s"
        done
        say "  after $SECONDS s: ${all:-nearly done}"
    done
}

build() {
    local lane status ended
    local -A lanes
    step 1 "Debian packages" deps packages_compile rust
    # With job control each gets its process group.
    set -m
    for lane in go rust machines; do
        "lane_$lane" </dev/null &
        lanes[$!]=$lane
    done
    progress </dev/null &
    groups=("${!lanes[@]}" $!)
    set +m
    while [ ${#lanes[@]} -gt 0 ]; do
        status=0
        wait -n -p ended "${!lanes[@]}" || status=$?
        lane=${lanes[$ended]}
        unset "lanes[$ended]"
        [ "$status" -eq 0 ] && continue
        [ "$lane" = machines ] || fail "the demo cannot be built; what failed is above"
        say "  what failed is above; the demo goes on without virtual machines" >&2
    done
    kill -TERM -- "-${groups[-1]}" 2>/dev/null || true
    groups=()
}

main() {
    check_with
    [ "$(id -u)" -eq 0 ] || fail "the demo starts a private containerd, which needs root: run it as root"
    build
    "$target/release/kuasar-demo"
}

# In one piece, so that an edit meanwhile does no harm.
main
exit
