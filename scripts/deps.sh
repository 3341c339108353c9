#!/usr/bin/env bash
# Installs what a purpose needs, and only what is missing: scripts/deps.sh [all|build|run|conformance|e2e|kubernetes|check|image|node|deb|STEP...]
#   build         what compiling and the guest need: Debian packages and Rust
#   run           and what a node is made of, for the demo, benchmarks and chaos: containerd, runc, CNI plugins, crun, QEMU and its helpers
#   conformance   and crictl and critest
#   e2e           and a second containerd
#   kubernetes    run, and a Kubernetes: a quarter of an hour and more, so not part of all
#   check         build, and what unit tests and audits run
#   image         what the image of a node in a virtual machine is built and booted with
#   node          image, and what is put into such a node
#   deb           what building Debian packages and testing them need
#   all           everything, the default
# A STEP is one of the functions below, such as packages_build or install_runc.
#
#   Debian packages   with apt-get
#   Rust              not by itself: says how
#   containerd, runc, CNI plugins, a second containerd, cargo-deny, crictl, critest, virtiofsd, vhost-device-vsock, Kubernetes
#                     at pinned versions into a cache outside the checkout ($KUASAR_CACHE, /var/cache/kuasar-tools)
#
# Go modules come through the module proxy; the go command checks each against the checksum database (sum.golang.org) and
# each of their own dependencies against their go.sum, and refuses what does not match. cargo does the same by its lock files.
# A tool named by a KUASAR_* variable, or on PATH in the pinned version or a newer one, is used instead.
. "$(dirname "$0")/lib.sh"

containerd=2.4.2
runc=1.3.5
cni=1.9.1
cri_tools=1.37.0
etcd=3.7.3
cargo_deny=0.20.2
virtiofsd=1.14.0
vhost_device_vsock=0.3.0
kubernetes_programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl)
go_hint="install Go 1.26 or newer (https://go.dev/dl/) and run make deps again"

root=()
if [ "$(id -u)" -ne 0 ]; then
    have sudo || fail "this needs root to install packages, and there is no sudo: run as root"
    root=(sudo)
fi

# To compile, to link static programs, and for the guest: its OCI runtime, and to list its modules and its initrd.
packages_compile() {
    debian_packages gcc libc6-dev make pkg-config protobuf-compiler libprotobuf-dev libseccomp-dev ca-certificates \
        libcap-ng-dev dpkg-dev debian-archive-keyring gperf libcap-dev libyajl-dev libjson-c-dev python3-minimal file busybox-static \
        kmod cpio xz-utils
}

# And for the small kernel.
packages_build() {
    packages_compile
    debian_packages flex bison bc libelf-dev lz4 perl
}

# To pack, to look into packages, and for a Debian to install them in.
packages_deb() {
    have dpkg-query || fail "not a Debian system, so no Debian packages: make install installs the same"
    packages_compile
    debian_packages dpkg-dev lintian mmdebstrap man-db
}

# What pods need on the node.
packages_node() {
    local wanted=(busybox-static iproute2 iptables)
    [ -n "${KUASAR_QEMU:-}" ] || have qemu-system-x86_64 || wanted+=(qemu-system-x86)
    debian_packages "${wanted[@]}"
}

# What builds the image of a node in a virtual machine, boots it and logs in.
packages_image() {
    local wanted=(mmdebstrap debian-archive-keyring e2fsprogs busybox-static kmod cpio xz-utils openssh-client util-linux)
    [ -n "${KUASAR_QEMU:-}" ] || have qemu-system-x86_64 || wanted+=(qemu-system-x86)
    debian_packages "${wanted[@]}"
}

# What makes the key and the certificate of an API server's client, and loop devices.
packages_kubernetes() { debian_packages openssl mount util-linux; }

# debian_packages NAME...: those that are not installed
debian_packages() {
    if ! have dpkg-query; then
        local program missing=()
        for program in cc make pkg-config protoc ip iptables; do have "$program" || missing+=("$program"); done
        [ ${#missing[@]} -eq 0 ] ||
            fail "not a Debian system and no ${missing[*]}: install them, and the headers of libseccomp, libcap-ng, libcap, libyajl and libjson-c, a static libc, a static busybox, Python, QEMU and kmod"
        return 0
    fi
    local missing
    missing=$(comm -23 <(printf '%s\n' "$@" | sort -u) \
        <(dpkg-query -W -f '${Package} ${db:Status-Status}\n' 2>/dev/null | awk '$2 == "installed" { print $1 }' | sort -u))
    [ -n "$missing" ] || return 0
    # shellcheck disable=SC2086
    timed "installing" $missing -- apt_install $missing
}

apt_install() {
    "${root[@]}" apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq -o DPkg::Lock::Timeout=600 --no-install-recommends "$@" >/dev/null
}

rust() {
    have cargo || fail "no cargo: install Rust with rustup (https://rustup.rs), then run make deps again"
    # With rustup the first call installs the toolchain that rust-toolchain.toml names.
    cargo --version >/dev/null
}

prepare_cache() {
    [ -d "$cache/bin" ] && [ -w "$cache/bin" ] && return 0
    "${root[@]}" mkdir -p "$cache/bin"
    [ -w "$cache/bin" ] || "${root[@]}" chown "$(id -u):$(id -g)" "$cache" "$cache/bin"
}

# A tool that is wanted in a version: whether the one named by a variable, in the cache or on PATH will do.
# usable VARIABLE NAME VERSION
usable() {
    local variable=$1 name=$2 wanted=$3 path
    [ -z "${!variable:-}" ] || return 0
    for path in "$cache/bin/$name" "$(command -v "$name" || true)"; do
        [ -x "$path" ] && at_least "$("$path" --version 2>/dev/null | version_in)" "$wanted" && return 0
    done
    return 1
}

# Installs into a directory of the cache by way of a scratch directory on the same file system: a program is there whole or not.
# into DIRECTORY COMMAND..., which finds the scratch directory in $GOBIN
into() {
    local to=$1 scratch
    shift
    scratch=$(mktemp -d "$cache/.install-XXXXXX")
    if ! GOBIN=$scratch "$@"; then
        rm -rf "$scratch"
        return 1
    fi
    mkdir -p "$to"
    chmod 755 "$scratch"/*
    mv -f "$scratch"/* "$to/"
    rmdir "$scratch"
}

# Without a line for each of some hundred modules.
without_downloads() { "$@" 2> >(grep -v '^go: downloading ' >&2); }

go_install() { GOFLAGS="${GOFLAGS:-} -trimpath" without_downloads go install -ldflags '-s -w' "$@"; }

# go install refuses a module whose go.mod has exclude or replace lines, as containerd 2.1's has. So the module is downloaded
# (and verified) as such, and built from a copy of it.
# go_build_module MODULE VERSION COMMAND...: the command runs in the copy
go_build_module() {
    local module=$1 version=$2 answer dir copy status=0
    shift 2
    # Outside the checkout, where no go.mod has a say. What went wrong is in the answer, too.
    answer=$(cd / && go mod download -json "$module@v$version") || true
    dir=$(sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p' <<<"$answer")
    if [ -z "$dir" ]; then
        sed -n 's/^\t"Error": "\(.*\)",\{0,1\}$/\1/p' <<<"$answer" >&2
        return 1
    fi
    copy=$(mktemp -d "$cache/.build-XXXXXX")
    cp -r --no-preserve=mode "$dir/." "$copy/"
    (cd "$copy" && GOFLAGS="${GOFLAGS:-} -trimpath -buildvcs=false" without_downloads "$@") || status=$?
    rm -rf "$copy"
    return $status
}

# Without Go: the distribution's package, where it is new enough.
# packaged PACKAGE VERSION
packaged() {
    local candidate
    have apt-cache || return 1
    candidate=$(apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')
    [ -n "$candidate" ] && [ "$candidate" != "(none)" ] && dpkg --compare-versions "$candidate" ge "$2" || return 1
    say "installing $1 $candidate from the distribution"
    DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq -o DPkg::Lock::Timeout=600 --no-install-recommends "$1" >/dev/null
}

install_containerd() {
    usable KUASAR_CONTAINERD containerd "$containerd" && return 0
    if have go; then
        local module=github.com/containerd/containerd/v2/cmd
        timed "building containerd $containerd" -- into "$cache/bin" go_install "$module/containerd@v$containerd" "$module/ctr@v$containerd" "$module/containerd-shim-runc-v2@v$containerd"
    else
        usable KUASAR_CONTAINERD containerd 2.0.0 || packaged containerd 2.0 ||
            fail "no containerd 2.0 or newer, no Go to build it, and the distribution has none: $go_hint, or set KUASAR_CONTAINERD"
    fi
}

build_old_containerd() {
    CGO_ENABLED=1 go build -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$containerd_old" \
        -o "$GOBIN/" ./cmd/containerd ./cmd/ctr ./cmd/containerd-shim-runc-v2
}

install_old_containerd() {
    local dir=$cache/containerd-$containerd_old/bin
    [ -x "$dir/containerd" ] && [ -x "$dir/ctr" ] && [ -x "$dir/containerd-shim-runc-v2" ] && return 0
    if ! have go; then
        say "no Go: the tests will run on one version of containerd only, not on $containerd_old too"
        return 0
    fi
    timed "building containerd $containerd_old" -- into "$dir" go_build_module github.com/containerd/containerd/v2 "$containerd_old" build_old_containerd
}

install_runc() {
    usable KUASAR_RUNC runc "$runc" && return 0
    if have go; then
        # Without the tag it would refuse every seccomp profile.
        CGO_ENABLED=1 timed "building runc $runc" -- into "$cache/bin" go_install -tags seccomp "github.com/opencontainers/runc@v$runc"
    else
        usable KUASAR_RUNC runc 1.1.0 || packaged runc 1.1 ||
            fail "no runc 1.1 or newer, no Go to build it, and the distribution has none: $go_hint, or set KUASAR_RUNC"
    fi
}

install_cni() {
    local dir
    [ -z "${KUASAR_CNI_BIN:-}" ] || return 0
    for dir in "$cache/bin" /opt/cni/bin /usr/lib/cni; do
        [ -x "$dir/bridge" ] && [ -x "$dir/host-local" ] && [ -x "$dir/loopback" ] && [ -x "$dir/portmap" ] && return 0
    done
    if have go; then
        local module=github.com/containernetworking/plugins/plugins
        timed "building CNI plugins $cni" -- into "$cache/bin" go_install "$module/main/bridge@v$cni" "$module/main/loopback@v$cni" \
            "$module/ipam/host-local@v$cni" "$module/meta/portmap@v$cni"
    else
        packaged containernetworking-plugins 1.0 ||
            fail "no CNI plugins, no Go to build them, and the distribution has none: $go_hint, or set KUASAR_CNI_BIN"
    fi
}

install_cargo_deny() {
    { PATH=$cache/bin:$PATH cargo deny --version >/dev/null 2>&1; } && return 0
    # Unoptimised: it builds in a third of the time and runs for a second.
    CARGO_TARGET_DIR=$cache/.cargo-deny timed "building cargo-deny $cargo_deny" -- cargo install --quiet --locked --debug --root "$cache" "cargo-deny@$cargo_deny"
    rm -rf "$cache/.cargo-deny"
}

# What serves microVMs on the host's side, as crates: cargo_tool VARIABLE CRATE VERSION
cargo_tool() {
    local variable=$1 crate=$2 version=$3
    usable "$variable" "$crate" "$version" && return 0
    CARGO_TARGET_DIR=$cache/.$crate timed "building $crate $version" -- cargo install --quiet --locked --root "$cache" "$crate@$version"
    rm -rf "$cache/.$crate"
}

# critest is a test binary, which go install does not build. Both tell the version that they are linked with.
build_cri_tools() {
    local flags="-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$cri_tools"
    go build -ldflags "$flags" -o "$GOBIN/crictl" ./cmd/crictl && go test -c -ldflags "$flags" -o "$GOBIN/critest" ./cmd/critest
}

# Only conformance needs them, and skips loudly without: not having them is no failure.
install_cri_tools() {
    usable KUASAR_CRITEST critest "$cri_tools" && return 0
    local tried=$cache/.no-cri-tools
    # Not to be asked for at each run.
    [ -z "$(find "$tried" -mtime -1 2>/dev/null)" ] || return 0
    if ! have go; then
        say "no critest $cri_tools and no Go to build it: conformance will be skipped without one; $go_hint, or set KUASAR_CRITEST"
        return 0
    fi
    if ! timed "building crictl and critest $cri_tools" -- \
        into "$cache/bin" go_build_module sigs.k8s.io/cri-tools "$cri_tools" build_cri_tools 2>"$cache/.cri-tools.log"; then
        touch "$tried"
        say "cri-tools cannot be built ($(tail -n 1 "$cache/.cri-tools.log")): conformance will be skipped; set KUASAR_CRITEST to a critest you have"
    fi
}

# In both modules replace lines name directories of a whole checkout. The modules of the same release are what goes there; their sums
# come from the checksum database.
build_etcd() {
    local module
    for module in api client/pkg client pkg; do go mod edit -dropreplace "go.etcd.io/etcd/$module/v3"; done
    GOFLAGS="$GOFLAGS -mod=mod" CGO_ENABLED=0 go build -ldflags '-s -w' -o "$GOBIN/etcd" .
}

build_kubernetes() {
    local version=k8s.io/component-base/version number=${kubernetes_version#*.}
    # With version 1.37.2 go k8s.io/api 0.37.2 and the others.
    sed -i -E "s#=> \./staging/src/(k8s\.io/[a-z0-9-]+)#=> \1 v0.$number#" go.mod
    rm -rf vendor staging
    # A program that is not told its version is 0.0.0 to its clients.
    GOFLAGS="$GOFLAGS -mod=mod" GOWORK=off CGO_ENABLED=0 go build -o "$GOBIN/" \
        -ldflags "-s -w -X $version.gitVersion=v$kubernetes_version -X $version.gitMajor=1 -X $version.gitMinor=${number%.*}" \
        "${kubernetes_programs[@]/#/./cmd/}"
}

install_kubernetes() {
    local dir=$cache/kubernetes-$kubernetes_version program missing=()
    for program in etcd "${kubernetes_programs[@]}"; do [ -x "$dir/$program" ] || missing+=("$program"); done
    [ ${#missing[@]} -ne 0 ] || return 0
    have go || fail "no Kubernetes $kubernetes_version in $cache and no Go to build it: $go_hint"
    [ -x "$dir/etcd" ] || timed "building etcd $etcd" -- into "$dir" go_build_module go.etcd.io/etcd/server/v3 "$etcd" build_etcd
    [ "${missing[*]}" = etcd ] || timed "building Kubernetes $kubernetes_version (a quarter of an hour or more)" -- \
        into "$dir" go_build_module k8s.io/kubernetes "$kubernetes_version" build_kubernetes
}

install_crun() { scripts/crun.sh; }
install_virtiofsd() { cargo_tool KUASAR_VIRTIOFSD virtiofsd "$virtiofsd"; }
install_vhost_device_vsock() { cargo_tool KUASAR_VHOST_DEVICE_VSOCK vhost-device-vsock "$vhost_device_vsock"; }

build=(packages_build rust)
run=("${build[@]}" packages_node install_containerd install_runc install_crun install_cni install_virtiofsd install_vhost_device_vsock)
conformance=("${run[@]}" install_cri_tools)
e2e=("${conformance[@]}" install_old_containerd)
kubernetes=("${run[@]}" packages_kubernetes install_kubernetes)
check=("${build[@]}" packages_node install_runc install_crun install_virtiofsd install_vhost_device_vsock install_cargo_deny)
image=(packages_image)
node=("${image[@]}" "${build[@]}" install_containerd install_runc install_crun install_cni install_cri_tools)
all=("${e2e[@]}" "${image[@]}" packages_deb install_cargo_deny)
deb=(packages_deb)

main() {
    [ $# -gt 0 ] || set -- all
    local wanted step steps=()
    for wanted in "$@"; do
        case $wanted in
        build | run | conformance | e2e | kubernetes | check | image | node | deb | all)
            local -n purpose=$wanted
            steps+=("${purpose[@]}")
            ;;
        packages_* | rust | install_*)
            [ "$(type -t "$wanted")" = function ] || fail "no step $wanted in scripts/deps.sh"
            steps+=("$wanted")
            ;;
        *) fail "nothing is called $wanted here: all, build, run, conformance, e2e, kubernetes, check, image, node, deb, or a step of scripts/deps.sh" ;;
        esac
    done
    prepare_cache
    for step in "${steps[@]}"; do "$step"; done
}

# It takes minutes, and bash reads a script as it goes: in one piece, so that an edit meanwhile does no harm.
main "$@"
exit
