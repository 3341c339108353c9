#!/usr/bin/env bash
# Tests scripts/guest.sh with the kernel that `make build` takes: what is in the initrd, that the same input gives the same bytes,
# that it boots, and what is refused.
. "$(dirname "$0")/lib.sh"
. scripts/cases.sh

unset UPDATE KERNEL
agent=$(realpath -m "${KUASAR_GUEST_AGENT:-$target/release/kuasar-guest-agent}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Builds into a directory of its own: build DIRECTORY ASSIGNMENT...
build() {
    local to=$scratch/$1
    shift
    env KUASAR_GUEST_DIR="$to" KUASAR_GUEST_AGENT="$agent" "$@" scripts/guest.sh
}

# Whether a build fails and says so: refused WORDS ASSIGNMENT...
refused() {
    local words=$1 output
    shift
    if output=$(build refused "$@" 2>&1); then
        say "it was built"
        return 1
    fi
    grep -qF -- "$words" <<<"$output" || { say "it said: $output"; return 1; }
    [ -z "$(find "$scratch/refused" -name '.new-*' -o -name initrd)" ] || { say "files were left"; return 1; }
}

files() { echo "$scratch/$1"/*/"$2"; }

same_bytes() {
    build first
    (umask 077 && build second TZ=Asia/Tokyo LC_ALL=C.UTF-8)
    local name
    for name in vmlinuz initrd initrd-debug manifest; do cmp "$(files first $name)" "$(files second $name)"; done
}

second_run_changes_nothing() {
    local before after
    before=$(stat -c '%n %i' "$scratch"/first/*/*)
    build first
    after=$(stat -c '%n %i' "$scratch"/first/*/*)
    [ "$before" = "$after" ]
}

contents() {
    local list name
    list=$(cpio -tv --quiet <"$(files first initrd)")
    for name in init bin/crun dev proc sys run tmp etc; do
        awk -v name="$name" '$NF == name { found = 1 } END { exit !found }' <<<"$list" || { say "no $name"; return 1; }
    done
    ! awk '$3 != "root" || $4 != "root" || !/Jan +1 +1970/' <<<"$list" | grep . || { say "an owner or a time"; return 1; }
    mkdir -p "$scratch/unpacked"
    (cd "$scratch/unpacked" && cpio -id --quiet --no-preserve-owner init bin/crun 'etc/modules' 'lib/modules/*' <"$(files first initrd)")
    cmp "$agent" "$scratch/unpacked/init"
    "$scratch/unpacked/bin/crun" --version | grep '+CAP.*+SECCOMP.*+EBPF'
    [ -e "$scratch/unpacked/etc/modules" ] || return 0
    diff <(cut -d ' ' -f 1 "$scratch/unpacked/etc/modules" | sort -u) <(cd "$scratch/unpacked" && printf '/%s\n' lib/modules/*.ko | sort)
}

# Each module comes after those it needs.
module_order() {
    local file needs name seen=" " module
    [ -e "$scratch/unpacked/etc/modules" ] || { say "SKIP this kernel has no modules"; return 0; }
    while read -r file _; do
        module=$(basename "$file" .ko)
        needs=$(modinfo -F depends "$scratch/unpacked$file")
        for name in ${needs//,/ }; do
            [[ $seen == *" ${name//-/_} "* ]] || { say "$module comes before $name"; return 1; }
        done
        seen+="${module//-/_} "
    done <"$scratch/unpacked/etc/modules"
}

# With an init that loads the modules and says so. It is not the agent that is tested here.
boots() {
    local qemu=${KUASAR_QEMU:-qemu-system-x86_64}
    have "$qemu" || { say "SKIP no QEMU: run make deps or set KUASAR_QEMU"; return 0; }
    gcc -Os -static -o "$scratch/init" scripts/guest-test-init.c
    (agent=$scratch/init && build booted)
    cat "$(files booted initrd)" "$(files booted initrd-debug)" >"$scratch/both"
    timeout 120 "$qemu" -M q35 -accel tcg -cpu max -m 256 -nodefaults -no-user-config -display none -no-reboot \
        -device virtio-rng-pci -device virtio-serial-pci -serial "file:$scratch/console" \
        -kernel "$(files booted vmlinuz)" -initrd "$scratch/both" \
        -append 'console=ttyS0 quiet panic=-1' </dev/null
    tail -n 5 "$scratch/console"
    grep -q '^guest ok' "$scratch/console"
}

it same_bytes same_bytes
it second_run_changes_nothing second_run_changes_nothing
it contents contents
it module_order module_order
it boots boots
truncate -s $((10 * 1024 * 1024 + 1)) "$scratch/large"
chmod +x "$scratch/large"
# It is asked for its version.
{ printf '#!/bin/sh\nexit 0\n' && head -c $((12 * 1024 * 1024)) /dev/zero; } >"$scratch/large-crun"
chmod +x "$scratch/large-crun"
it agent_too_large refused 'more than the 10485760 it may have' KUASAR_GUEST_AGENT="$scratch/large"
it initrd_too_large refused 'more than the 12582912 it may have' KUASAR_GUEST_CRUN="$scratch/large-crun"
it no_agent refused 'KUASAR_GUEST_AGENT names no program' KUASAR_GUEST_AGENT="$scratch/absent"
it no_kernel refused 'KUASAR_GUEST_KERNEL names no readable kernel' KUASAR_GUEST_KERNEL="$scratch/absent"
it no_crun refused 'KUASAR_GUEST_CRUN names no program' KUASAR_GUEST_CRUN="$scratch/absent"

sum_up
