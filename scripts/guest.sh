#!/usr/bin/env bash
# Builds what a microVM boots, a kernel and an initrd, into $KUASAR_CACHE/guest/<kernel>/: scripts/guest.sh [cloud|mini|own]
#
#   cloud   the distribution's kernel for virtual machines, with the modules that guest/modules names; nothing is compiled
#   mini    a small kernel from the distribution's kernel source and guest/kernel.fragment, everything built in
#   own     the kernel that KUASAR_GUEST_KERNEL names, everything built in; the default when that is set
#
# Kernels are kept in the cache by a digest of all that goes into them, as crun is by scripts/crun.sh. The same input gives the same bytes: see
# docs/guest.md, and manifest beside the files for what went in.
. "$(dirname "$0")/lib.sh"
. scripts/apt.sh

kernel=${1:-cloud}
# Of the kernel's packages and of crun's sources, each once.
update=${UPDATE:-}
[ -z "${KUASAR_GUEST_KERNEL:-}" ] || [ $# -gt 0 ] || kernel=own
out=${KUASAR_GUEST_DIR:-$cache/guest}/$kernel
# In bytes, of the agent alone and of the whole initrd.
agent_budget=$((10 * 1024 * 1024))
initrd_budget=$((12 * 1024 * 1024))

export LC_ALL=C TZ=UTC
umask 022

digest() { sha256sum | cut -c 1-16; }
sha256() { sha256sum "$1" | cut -d ' ' -f 1; }
compiler() { gcc --version | head -n 1; ld --version | head -n 1; }

# Makes a directory of the cache, whole or not at all: keep DIRECTORY COMMAND..., which finds the scratch directory in $scratch
keep() {
    local to=$1
    shift
    [ ! -d "$to" ] || return 0
    mkdir -p "$(dirname "$to")"
    scratch=$(mktemp -d "$(dirname "$to")/.build-XXXXXX")
    "$@"
    chmod 755 "$scratch"
    # Another run may have been as fast, with the same outcome.
    mv -T "$scratch" "$to" 2>/dev/null || { [ -d "$to" ] && rm -rf "$scratch"; }
    scratch=
}
scratch=
trap 'rm -rf ${scratch:+"$scratch"} ${apt_scratch:+"$apt_scratch"}' EXIT
trap 'exit 130' INT TERM

# Kernels. Each function sets kernel_dir, with vmlinuz and perhaps modules/ and modules.list, and kernel_text for the manifest.

kernel_cloud() {
    apt_prepare
    local package version
    package=$(apt_stands_for linux-image-cloud-amd64 linux-image-)
    [ -n "$package" ] || fail "the distribution has no linux-image-cloud-amd64: set KUASAR_GUEST_KERNEL to a kernel with everything built in"
    version=$(apt_version "$package")
    kernel_dir=$cache/guest-kernel/cloud-$version-$(cat guest/modules <(declare -f unpack_cloud module_order) | digest)
    kernel_text="kernel $package $version"
    keep "$kernel_dir" unpack_cloud "$package" "$version"
}

unpack_cloud() {
    say "unpacking $1 $2"
    local tree=$scratch/tree name file later
    apt_unpack "$1" "$2" "$tree"
    cp "$tree"/boot/vmlinuz-* "$scratch/vmlinuz"
    mkdir "$scratch/modules"
    depmod -b "$tree" "$(ls "$tree/lib/modules")"
    module_order "$tree" >"$scratch/order"
    while read -r file later; do
        name=$(basename "$file")
        cp "$file" "$scratch/modules/$name"
        say "/lib/modules/$name${later:+ $later}" >>"$scratch/modules.list"
    done <"$scratch/order"
    rm -rf "$tree" "$scratch/order"
}

# Files of the modules that guest/modules names: first those that boot loads, each after those it depends on; then the others, each with its
# aliases or -, and with what has to be loaded before it, both with commas.
module_order() {
    local dir
    dir=$(echo "$1"/lib/modules/*)
    awk -v dir="$dir" '
        function name_of(path) { sub(/.*\//, "", path); sub(/\.ko.*/, "", path); gsub(/-/, "_", path); return path }
        function join(list, word) { return list (list == "" ? "" : ",") word }
        function boot(path) { if (!at_boot[path]++) print dir "/" path }
        function want(path) { if (!wanted[path]++) order[++count] = path }
        FILENAME ~ /modules.builtin$/ { builtin[name_of($1)] = 1; next }
        FILENAME ~ /modules.dep$/ { path = $1; sub(/:$/, "", path); line[name_of(path)] = $0; file[name_of(path)] = path; next }
        # Patterns are for devices of a bus, and none of these modules is for one.
        FILENAME ~ /modules.alias$/ { if ($1 == "alias" && $2 !~ /[*?[,]/) known[$3] = join(known[$3], $2); next }
        { sub(/#.*/, "") }
        NF == 0 || $1 in builtin { next }
        !($1 in file) { print "error: the kernel has no module " $1 ", which guest/modules names" > "/dev/stderr"; exit 1 }
        {
            # What has to come first is listed last.
            n = split(line[$1], parts, " ")
            for (i = n; i > 1; i--) if (NF == 1) boot(parts[i]); else want(parts[i])
            if (NF == 1) boot(file[$1]); else want(file[$1])
            if (NF > 1 && $2 != "*") alias[file[$1]] = join(alias[file[$1]], $2)
        }
        END {
            for (k = 1; k <= count; k++) {
                path = order[k]
                if (at_boot[path]) continue
                n = split(line[name_of(path)], parts, " ")
                first = ""
                for (i = n; i > 1; i--) if (!at_boot[parts[i]]) { sub(/.*\//, "", parts[i]); first = join(first, parts[i]) }
                name = name_of(path)
                print dir "/" path, path in alias ? alias[path] : name in known ? known[name] : "-", first
            }
        }
    ' "$dir/modules.builtin" "$dir/modules.dep" "$dir/modules.alias" guest/modules | sed 's/ *$//'
}

kernel_mini() {
    apt_prepare
    local package version
    package=$(apt_stands_for linux-source linux-source-)
    [ -n "$package" ] || fail "the distribution has no linux-source: build a guest with make guest, or set KUASAR_GUEST_KERNEL"
    version=$(apt_version "$package")
    kernel_dir=$cache/guest-kernel/mini-$version-$({ cat guest/kernel.fragment; compiler; declare -f build_mini; } | digest)
    kernel_text="kernel $package $version
compiler $(compiler | paste -sd ' ')"
    keep "$kernel_dir" build_mini "$package" "$version"
}

build_mini() {
    say "building a kernel from $1 $2: some minutes of all processors, once"
    local program
    for program in make gcc flex bison bc lz4 perl; do have "$program" || fail "no $program: run make deps"; done
    apt_unpack "$1" "$2" "$scratch/package"
    mkdir "$scratch/tree"
    # Device trees are of other machines.
    tar -C "$scratch/tree" --strip-components=1 --exclude='*/arch/*/boot/dts' -xf "$scratch/package/usr/src/$1.tar.xz"
    rm -rf "$scratch/package"
    local make=(make -s -C "$scratch/tree" ARCH=x86_64 KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=kuasar KBUILD_BUILD_HOST=guest
        KBUILD_BUILD_VERSION=1 "KCFLAGS=-ffile-prefix-map=$scratch/tree=.")
    if ! {
        "${make[@]}" tinyconfig &&
            (cd "$scratch/tree" && scripts/kconfig/merge_config.sh -m .config "$OLDPWD/guest/kernel.fragment") &&
            "${make[@]}" olddefconfig
    } >"$scratch/log" 2>&1; then
        cat "$scratch/log" >&2
        fail "the kernel's configuration could not be made"
    fi
    check_config "$scratch/tree/.config"
    nice "${make[@]}" -j"$(nproc)" bzImage >"$scratch/log" 2>&1 || { tail -n 30 "$scratch/log" >&2; fail "the kernel did not build"; }
    cp "$scratch/tree/arch/x86/boot/bzImage" "$scratch/vmlinuz"
    cp "$scratch/tree/.config" "$scratch/config"
    rm -rf "$scratch/tree" "$scratch/log"
}

# Fails when a line of the fragment did not make it: an option that this kernel does not have, or that something else overrules.
check_config() {
    local line lost=()
    while read -r line; do
        case $line in
        CONFIG_*=n) ! grep -q "^${line%=n}=" "$1" || lost+=("$line") ;;
        CONFIG_*) grep -qxF "$line" "$1" || lost+=("$line") ;;
        esac
    done <guest/kernel.fragment
    [ ${#lost[@]} -eq 0 ] || fail "these lines of guest/kernel.fragment do not hold in the kernel's configuration: ${lost[*]}"
}

kernel_own() {
    local file=${KUASAR_GUEST_KERNEL:-}
    [ -r "$file" ] || fail "KUASAR_GUEST_KERNEL names no readable kernel: '$file'"
    kernel_dir=$cache/guest-kernel/own-$(digest <"$file")
    kernel_text="kernel $file"
    keep "$kernel_dir" copy_own "$file"
}

copy_own() { cp "$1" "$scratch/vmlinuz"; }

# The OCI runtime of the guest, the same as the node's. Sets crun and crun_text.
crun() {
    if [ -n "${KUASAR_GUEST_CRUN:-}" ]; then
        [ -x "$KUASAR_GUEST_CRUN" ] || fail "KUASAR_GUEST_CRUN names no program: '$KUASAR_GUEST_CRUN'"
        crun=$KUASAR_GUEST_CRUN
        crun_text="crun $crun"
        return 0
    fi
    UPDATE=$update scripts/crun.sh
    crun=$cache/bin/crun
    crun_text=$(cat "$crun.manifest")
}

# The agent, always asked of cargo, which knows best whether it is up to date. Sets agent.
agent() {
    if [ -n "${KUASAR_GUEST_AGENT:-}" ]; then
        [ -x "$KUASAR_GUEST_AGENT" ] || fail "KUASAR_GUEST_AGENT names no program: '$KUASAR_GUEST_AGENT'"
        agent=$KUASAR_GUEST_AGENT
        return 0
    fi
    local triple=x86_64-unknown-linux-gnu home=${CARGO_HOME:-$HOME/.cargo} flags
    # A static program of the C library that is there; paths of this machine would make another machine's differ.
    flags="-C target-feature=+crt-static --remap-path-prefix=$PWD=. --remap-path-prefix=$(realpath -m "$target")=target \
--remap-path-prefix=$home=cargo"
    RUSTFLAGS="${RUSTFLAGS:-} $flags" cargo build --quiet --locked --profile guest --target "$triple" -p kuasar-guest-agent
    agent=$target/release/kuasar-guest-agent
    # Beside the other programs.
    mkdir -p "$target/release"
    cmp -s "$target/$triple/guest/kuasar-guest-agent" "$agent" || install -m 755 "$target/$triple/guest/kuasar-guest-agent" "$agent"
}

# A cpio archive in the form that the kernel unpacks ("newc", Documentation/driver-api/early-userspace/buffer-format.rst), written
# here because then it depends on nothing but what goes in: no times, owners, inodes or link counts of the machine, and no root.
inode=0
zeros() { head -c "$1" /dev/zero; }
# entry NAME MODE [SIZE [MAJOR MINOR]], contents from standard input
entry() {
    local name=$1 mode=$2 size=${3:-0}
    inode=$((inode + 1))
    printf '070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\0' \
        "$inode" "$((mode))" 0 0 1 0 "$size" 0 0 "${4:-0}" "${5:-0}" "$((${#name} + 1))" 0 "$name"
    # The head is 110 bytes, and each part ends at a multiple of four.
    zeros $(((4 - (110 + ${#name} + 1) % 4) % 4))
    [ "$size" -eq 0 ] || { cat && zeros $(((4 - size % 4) % 4)); }
}
directory() { entry "$1" 040755; }
file() { entry "$1" "$2" "$(stat -L -c %s "$3")" <"$3"; }
link() { printf %s "$2" | entry "$1" 0120777 "${#2}"; }
trailer() { entry 'TRAILER!!!' 0; }

initrd() {
    local name
    for name in bin dev etc etc/kuasar; do directory "$name"; done
    # What the first process has as its standard streams, until it mounts a /dev.
    entry dev/console 020600 0 5 1
    file init 0100755 "$agent"
    file bin/crun 0100755 "$crun"
    # What the agent would have to ask it at each boot. Older ones know no features.
    "$crun" --version >"$scratch/runtime-version"
    "$crun" features >"$scratch/runtime-features" 2>/dev/null || : >"$scratch/runtime-features"
    for name in runtime-version runtime-features; do file "etc/kuasar/$name" 0100644 "$scratch/$name"; done
    rm "$scratch"/runtime-*
    if [ -e "$kernel_dir/modules.list" ]; then
        file etc/modules 0100644 "$kernel_dir/modules.list"
        for name in lib lib/modules; do directory "$name"; done
        for name in "$kernel_dir"/modules/*.ko; do file "lib/modules/${name##*/}" 0100644 "$name"; done
    fi
    for name in proc run sys tmp; do directory "$name"; done
    trailer
}

# To be appended to initrd: the kernel unpacks one archive after the other.
initrd_debug() {
    local name
    directory bin
    file bin/busybox 0100755 /bin/busybox
    /bin/busybox --list | sort | while read -r name; do [ "$name" = busybox ] || link "bin/$name" busybox; done
    trailer
}

within() {
    local what=$1 size=$2 budget=$3
    [ "$size" -le "$budget" ] ||
        fail "$what is $size bytes, more than the $budget it may have: take something out, or say in docs/guest.md why it may have more"
}

# Writes the files, unless they are there and were made of the same.
image() {
    local inputs busybox
    busybox=$(dpkg-query -W -f 'busybox-static ${Version}' busybox-static 2>/dev/null || say "busybox /bin/busybox")
    [ -x /bin/busybox ] || fail "no /bin/busybox: run make deps"
    inputs="$kernel_text
$crun_text
$busybox
input vmlinuz $(sha256 "$kernel_dir/vmlinuz")
input modules $(cat "$kernel_dir"/modules.list "$kernel_dir"/modules/*.ko 2>/dev/null | sha256sum | cut -d ' ' -f 1)
input kuasar-guest-agent $(sha256 "$agent")
input crun $(sha256 "$crun")
input busybox $(sha256 /bin/busybox)
input guest.sh $(sha256 scripts/guest.sh)"
    mkdir -p "$out"
    # Two runs would mix their files.
    exec 9>"$out/.lock"
    flock 9
    if [ "$(sed '/^output /d' "$out/manifest" 2>/dev/null)" = "$inputs" ] && [ -e "$out/vmlinuz" ] && [ -e "$out/initrd" ] && [ -e "$out/initrd-debug" ]; then
        return 0
    fi
    within "the agent ($agent)" "$(stat -L -c %s "$agent")" "$agent_budget"
    scratch=$(mktemp -d "$out/.new-XXXXXX")
    cp "$kernel_dir/vmlinuz" "$scratch/vmlinuz"
    initrd >"$scratch/initrd"
    initrd_debug >"$scratch/initrd-debug"
    within "initrd of the $kernel kernel" "$(stat -c %s "$scratch/initrd")" "$initrd_budget"
    say "$inputs" >"$scratch/manifest"
    local name
    for name in initrd initrd-debug vmlinuz; do say "output $name $(sha256 "$scratch/$name")"; done >>"$scratch/manifest"
    chmod 644 "$scratch"/*
    # The manifest last: it vouches for the others.
    rm -f "$out/manifest"
    for name in vmlinuz initrd initrd-debug manifest; do mv -f "$scratch/$name" "$out/$name"; done
    rmdir "$scratch"
    scratch=
    say "$out: kernel $(du -k "$out/vmlinuz" | cut -f 1) KiB, initrd $(du -k "$out/initrd" | cut -f 1) KiB"
}

main() {
    case $kernel in
    cloud | mini | own) ;;
    *) fail "no guest $kernel: cloud, mini, own" ;;
    esac
    [ "$(uname -m)" = x86_64 ] || fail "guests are built on x86_64 only, this is $(uname -m)"
    mkdir -p "$cache"
    "kernel_$kernel"
    crun
    agent
    image
}

# A kernel builds for minutes, and bash reads a script as it goes: in one piece, so that an edit meanwhile does no harm.
main
exit
