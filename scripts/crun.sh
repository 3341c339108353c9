#!/usr/bin/env bash
# Builds a static crun for the node and for guests, in the newest version that Debian's archive has, with a libseccomp as new:
# scripts/crun.sh. It is $KUASAR_CACHE/bin/crun then, and beside it crun.manifest says what went in.
#
# The sources are Debian's, of its development suite (sid); where the archive does not give those, of its stable suite; each is
# verified by the signatures of the archive, as apt does it. What has been built is kept by a digest of all that goes in.
# KUASAR_GUEST_CRUN names a static crun to use instead, for guests and by make install for the node, too.
. "$(dirname "$0")/lib.sh"
. scripts/apt.sh

export LC_ALL=C TZ=UTC
umask 022
scratch=
trap 'rm -rf ${scratch:+"$scratch"} ${apt_scratch:+"$apt_scratch"}' EXIT
trap 'exit 130' INT TERM

suites=(sid stable)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# One directory for each digest.
built=$cache/crun

digest() { sha256sum | cut -c 1-16; }
compiler() { gcc --version | head -n 1; ld --version | head -n 1; }

# Lets apt.sh, with apt_state as the suite's, know its sources, and those alone.
use_suite() {
    apt_current || apt_with "deb-src [signed-by=$keyring] $(debian_mirror) $1 main"
}

# Fetches sources of the suite in use: whole packages with Debian's patches, or, where the archive lacks a part, the original.
# fetch_source PACKAGE DIRECTORY
fetch_source() {
    apt_source "$1" "$2" || apt_original "$1" "$2"
}

# What apt says is in $scratch/log.
fetch_sources() {
    { fetch_source libseccomp "$scratch/libseccomp" && fetch_source crun "$scratch/crun"; } 2>"$scratch/log"
}

# Whether all that has failed is in the log, and is that the archive does not have it.
absent() {
    local failed
    failed=$(grep -E '^E: (Failed to fetch [a-z+]+:|Unable to find a source package)' "$scratch/log") &&
        ! grep -qvE '^E: Failed to fetch [^ ]+ +404 |^E: Unable' <<<"$failed"
}

build() {
    local log=$scratch/log root=$scratch/root json program
    for program in make gcc gperf pkg-config dpkg-source; do have "$program" || fail "no $program: run make deps"; done
    local flags="-Os -ffunction-sections -fdata-sections -ffile-prefix-map=$scratch=."
    # crun before 1.28 reads JSON with yajl, whose static library has a name of its own; later ones with json-c.
    mkdir -p "$root/lib"
    json=$(gcc -print-file-name=libyajl_s.a)
    [ ! -e "$json" ] || ln -s "$json" "$root/lib/libyajl.a"
    # A symbolic link of a root filesystem at /dev led out of it before 1.28 (CVE-2026-47766).
    sed -i 's/devfd = openat (get_private_data (container)->rootfsfd, "dev", \([A-Z_ |]*\));/devfd = safe_openat (get_private_data (container)->rootfsfd, rootfs, "dev", \1, 0, err);/' \
        "$scratch/crun/src/libcrun/linux.c"
    ! grep -q '= openat (get_private_data (container)->rootfsfd, "dev"' "$scratch/crun/src/libcrun/linux.c" ||
        fail "this crun follows symbolic links at /dev of a root filesystem, and scripts/crun.sh does not know how to mend it"
    # libgcrypt or blake3 of the machine would only be there by chance. A static program has no use for systemd's, CRIU's and shared
    # libraries: cgroups of systemd are asked for by kuasard's configuration only. What Python would generate is in the source.
    if ! (
        cd "$scratch/libseccomp" && ./configure --quiet --prefix="$root" --disable-shared --enable-static CFLAGS="$flags" &&
            make -s -j"$(nproc)" -C include && make -s -j"$(nproc)" -C src libseccomp.la &&
            make -s -C src install-libLTLIBRARIES && make -s -C include install && make -s install-pkgconfDATA &&
            cd "$scratch/crun" &&
            PKG_CONFIG_PATH=$root/lib/pkgconfig ac_cv_search_gcry_check_version=no ac_cv_search_blake3_hasher_init=no \
                ./configure --quiet --disable-systemd --disable-criu --disable-dl --disable-shared \
                CFLAGS="$flags -I$root/include" LDFLAGS="-L$root/lib" &&
            make -s -j"$(nproc)" -C libocispec PYTHON=: libocispec.la &&
            make -s -j"$(nproc)" .version git-version.h &&
            make -s -j"$(nproc)" crun LDFLAGS="-L$root/lib -Wl,--gc-sections -static-libgcc -all-static" &&
            strip crun
    ) >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        fail "crun did not build"
    fi
    local features
    features=$("$scratch/crun/crun" --version)
    [[ $features == *+CAP*+SECCOMP*+EBPF* ]] || fail "the crun built lacks capabilities, seccomp or eBPF: $features"
}

main() {
    local suite versions libraries dir again=
    [ -z "${KUASAR_GUEST_CRUN:-}" ] || return 0
    have apt-get && have dpkg-source && [ -e "$keyring" ] ||
        fail "no apt, dpkg-source or $keyring, so no sources of crun: run make deps, or set KUASAR_GUEST_CRUN to a static crun"
    mkdir -p "$cache/bin" "$built"
    libraries=$(dpkg-query -W -f '${Package} ${Version}\n' libc6-dev libcap-dev libyajl-dev libjson-c-dev 2>/dev/null) ||
        fail "crun needs libc6-dev, libcap-dev, libyajl-dev and libjson-c-dev: run make deps"
    exec 9>"$built/.lock"
    flock 9
    local update=${UPDATE:-}
    for suite in "${suites[@]}"; do
        apt_state=$cache/apt-$suite
        # What cannot be fetched is said, and kept out of mind: the next run tries again.
        (UPDATE=$update use_suite "$suite") || { again=1; continue; }
        versions="crun $(apt_source_version crun)
libseccomp $(apt_source_version libseccomp)"
        dir=$built/$({ say "$versions
$libraries"; compiler; declare -f build; } | digest)
        if [ ! -x "$dir/crun" ]; then
            # A mirror may list what it does not have; it is not asked again until the lists are new.
            [ ! -e "$apt_state/known/incomplete" ] || continue
            scratch=$(mktemp -d "$built/.build-XXXXXX")
            if ! fetch_sources; then
                if absent; then
                    say "the archive has no sources of $(paste -sd ' ' <<<"$versions") ($suite); UPDATE=1 asks it again" >&2
                    touch "$apt_state/known/incomplete"
                else
                    grep '^E: ' "$scratch/log" >&2 || cat "$scratch/log" >&2
                    say "the sources of $(paste -sd ' ' <<<"$versions") ($suite) cannot be fetched (above): run it again, or with \
UPDATE=1 for newer lists" >&2
                    again=1
                fi
                rm -rf "$scratch"
                scratch=
                continue
            fi
            say "building a static $(paste -sd ' ' <<<"$versions")" >&2
            build
            mkdir "$scratch/out"
            mv "$scratch/crun/crun" "$scratch/out/"
            say "$versions
$libraries
compiler $(compiler | paste -sd ' ')" >"$scratch/out/manifest"
            mv -T "$scratch/out" "$dir"
            rm -rf "$scratch"
            scratch=
        fi
        cmp -s "$dir/crun" "$cache/bin/crun" || { install -m 755 "$dir/crun" "$cache/bin/.crun" && mv -f "$cache/bin/.crun" "$cache/bin/crun"; }
        install -m 644 "$dir/manifest" "$cache/bin/crun.manifest"
        return 0
    done
    [ -z "$again" ] || fail "the sources of crun and libseccomp cannot be fetched (above): run it again, or with UPDATE=1 for newer \
lists, or set KUASAR_GUEST_CRUN to a static crun"
    fail "no suite of $(debian_mirror) has the sources of crun and libseccomp: run it with UPDATE=1, or set KUASAR_GUEST_CRUN to a static crun"
}

main
exit
