#!/usr/bin/env bash
# Packs what is built into Debian packages: scripts/deb.sh [KERNEL]
#
#   kuasar        kuasard, kuasarctl, the programs that containerd looks for, unit, configuration, manual pages, completions, documents
#   kuasar-crun   the static crun, for kuasard alone
#   kuasar-guest  what virtual machines boot
#
# They are in target/deb then, in place of those that were there. `scripts/deb.sh --version` tells their version. DEB_VERSION is the version to use instead of that of the commit; DEB_OUT another directory;
# DEB_COMPRESSION what dpkg-deb -Z takes, xz by default; DEBFULLNAME and DEBEMAIL who stands in them as maintainer.
#
# dpkg-gencontrol and dpkg-shlibdeps do what they do for any package, from packaging/debian/control. There is no source package: what
# is packed is what `make install` installs. The same commit and the same programs give the same bytes.
. "$(dirname "$0")/lib.sh"

export LC_ALL=C TZ=UTC
umask 022

kernel=${1:-cloud}
guest=${KUASAR_GUEST_DIR:-$cache/guest}/$kernel
release=$(realpath -m "$target")/release
out=$(realpath -m "${DEB_OUT:-$target/deb}")
compression=${DEB_COMPRESSION:-xz}
export DEBFULLNAME=${DEBFULLNAME:-Kuasar Authors} DEBEMAIL=${DEBEMAIL:-kuasar-io@users.noreply.github.com}
work=
trap 'rm -rf ${work:+"$work"}' EXIT
trap 'exit 130' INT TERM

git_() { git -c safe.directory='*' "$@" 2>/dev/null; }

# In seconds: of the commit, or now where there is none, or where something has changed since.
date_of_sources() {
    if [ -n "$(git_ rev-parse HEAD)" ] && [ -z "$(git_ status --porcelain --untracked-files=no)" ]; then
        git_ log -1 --format=%ct
    else
        date +%s
    fi
}

# That of Cargo.toml, with the commit's time unless the commit has the version's tag. What comes before the release sorts below it, what
# comes after it above it, and a later commit above an earlier one.
version() {
    local release commit sign='~'
    release=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
    # dpkg takes no hyphen in what has a revision, and sorts 1.0~rc1 below 1.0.
    release=${release//-/\~}
    commit=$(git_ rev-parse --short=8 HEAD) || { say "$release-1"; return; }
    if [ -n "$(git_ rev-parse "refs/tags/v$release")" ]; then
        [ -n "$(git_ status --porcelain --untracked-files=no)" ] || [ -z "$(git_ tag --points-at HEAD "v$release")" ] ||
            { say "$release-1"; return; }
        ! git_ merge-base --is-ancestor "v$release" HEAD || sign=+
    fi
    say "$release${sign}git$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d.%H%M%S).$commit-1"
}

# Where crates are that a crate of ours is linked with, beside "name version licence" each: crates CRATE
crates() {
    local places name version licence
    places=$(cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu |
        grep -o '"manifest_path":"[^"]*"' | sed 's/^"manifest_path":"\(.*\)\/Cargo.toml"$/\1/')
    # Macros and build scripts work on the builder and are not linked.
    cargo tree --locked -p "$1" -e normal,no-proc-macro --target x86_64-unknown-linux-gnu --prefix none --format '{p}|{l}' |
        sed 's/ (\*)$//; / (\//d' | sort -u | while IFS='|' read -r name licence; do
        version=${name#* v}
        name=${name%% *}
        say "$name ${version%% *} ${licence:-?}|$(grep -m 1 -E "/$name(-$(sed 's/[.+]/[&]/g' <<<"${version%% *}"))?\$" <<<"$places")"
    done
}

# What is linked into programs of ours, and every different text that it comes with, once: third_party CRATE
third_party() {
    local what place file sum list=$work/crates texts=$work/texts
    crates "$1" >"$list"
    [ "$(wc -l <"$list")" -gt 5 ] || fail "cargo tree tells no crates that $1 is linked with"
    ! grep '|$' "$list" >&2 || fail "these crates are not where cargo metadata says (above)"
    say "Linked statically with the Rust crates below and with Rust's standard library"
    say "($(rustc --version), MIT OR Apache-2.0; its notices, where the"
    say "builder has them, are in RUST-LIBRARY.html.gz). Texts follow the list; a crate without one"
    say "of its own is under the standard text of the licence that is named for it."
    say
    cut -d '|' -f 1 "$list"
    rm -rf "$texts"
    mkdir "$texts"
    while IFS='|' read -r what place; do
        while IFS= read -r file; do
            sum=$(sha256sum <"$file" | cut -c 1-16)
            [ -e "$texts/$sum" ] || cp "$file" "$texts/$sum"
            say "$(cut -d ' ' -f 1,2 <<<"$what")" >>"$texts/$sum.of"
        done < <(find "$place" -maxdepth 1 -type f -iregex '.*/\(licen[cs]e\|copying\|copyright\|notice\|unlicense\)[^/]*' | sort)
    done <"$list"
    for file in "$texts"/*.of; do
        say
        say "===== $(sort -u "$file" | paste -sd ',' | sed 's/,/, /g')"
        say
        cat "${file%.of}"
    done
}

# licences CRATE PACKAGE
licences() {
    local doc=$work/$2/usr/share/doc/$2 library
    third_party "$1" | zipped >"$doc/THIRD-PARTY.gz"
    library=$(rustc --print sysroot)/share/doc/rust/COPYRIGHT-library.html
    [ ! -e "$library" ] || zipped <"$library" >"$doc/RUST-LIBRARY.html.gz"
}

# The Debian source package of a name in a manifest, for Built-Using (policy 7.8): source_of NAME VERSION
source_of() {
    # A rebuild of the binary (+b1) has the same source.
    local version
    version=$(sed -E 's/\+b[0-9]+$//' <<<"$2")
    case $1 in
    linux-image-* | linux-source-*) say "linux (= $version)" ;;
    libc6-dev) say "glibc (= $version)" ;;
    libcap-dev) say "libcap2 (= $version)" ;;
    libjson-c-dev) say "json-c (= $version)" ;;
    libyajl-dev) say "yajl (= $version)" ;;
    busybox-static) say "busybox (= $version)" ;;
    crun | libseccomp) say "$1 (= $version)" ;;
    esac
}

# built_using MANIFEST: its lines as that field
built_using() {
    local name rest version
    while read -r name rest; do
        # A kernel's line begins with that word; the second word of others is the version.
        [ "$name" != kernel ] || read -r name rest <<<"$rest"
        version=${rest%% *}
        [ -z "$version" ] || source_of "$name" "$version"
    done <"$1" | sort -u | paste -sd ',' | sed 's/,/, /g'
}

# What is bundled, and where its sources are: sources MANIFEST
sources() {
    say "Built from these source packages of Debian:"
    say
    built_using "$1" | sed 's/, /\n/g; s/(= \(.*\))/\1/' | sed 's/^/    /; s/)$//'
    say
    say "Each is to be had by 'apt-get source NAME=VERSION', and every version that Debian"
    say "ever had is at https://snapshot.debian.org. crun before 1.28 has one change, which is"
    say "in scripts/crun.sh of Kuasar's sources; that script builds it, scripts/guest.sh packs"
    say "the initrd (https://github.com/kuasar-io/kuasar, commit ${commit:-unknown})."
    say
    say "The builder's record:"
    say
    sed 's/^/    /' "$1"
}

# Of libraries that are linked with crun, as this machine has them.
crun_texts() {
    local package file
    for package in libc6-dev libseccomp-dev libcap-dev libyajl-dev libjson-c-dev; do
        file=/usr/share/doc/$package/copyright
        [ -e "$file" ] || continue
        say "===== $package"
        say
        cat "$file"
        say
    done
}

# The same bytes for the same input.
zipped() { gzip -9nc; }

# What every package has: documents PACKAGE
documents() {
    local doc=$work/$1/usr/share/doc/$1
    install -d "$doc"
    install -m 644 "packaging/debian/$1.copyright" "$doc/copyright"
    zipped <"$work/debian/changelog" >"$doc/changelog.Debian.gz"
    zipped <CHANGELOG.md >"$doc/changelog.gz"
    if [ -e "packaging/debian/$1.lintian-overrides" ]; then
        install -D -m 644 "packaging/debian/$1.lintian-overrides" "$work/$1/usr/share/lintian/overrides/$1"
    fi
}

# Moves a path of what is installed into another package: hand PATH PACKAGE
hand() {
    mkdir -p "$work/$2/$(dirname "$1")"
    mv "$work/kuasar/$1" "$work/$2/$1"
}

stage() {
    local share=$work/kuasar/usr/share file
    make --no-print-directory -s install-built DESTDIR="$work/kuasar" PREFIX=/usr SYSCONFDIR=/etc KERNEL="$kernel" >/dev/null
    hand usr/libexec/kuasar/crun kuasar-crun
    rmdir -p --ignore-fail-on-non-empty "$work/kuasar/usr/libexec/kuasar"
    hand usr/share/kuasar/guest kuasar-guest
    rmdir --ignore-fail-on-non-empty "$share/kuasar"
    # Debian's zsh looks elsewhere than zsh itself.
    mv "$share/zsh/site-functions" "$share/zsh/vendor-completions"
    install -m 644 packaging/debian/containerd-shim-kuasar-v1.8 "$share/man/man8/"
    for file in "$work"/kuasar/usr/bin/containerd-shim-*; do
        [ ! -L "$file" ] || ln -s containerd-shim-kuasar-v1.8.gz "$share/man/man8/${file##*/}.8.gz"
    done
    find "$share/man" -type f -exec gzip -9n {} +
    for file in kuasar kuasar-crun kuasar-guest; do documents "$file"; done
    cp README.md docs/*.md "$share/doc/kuasar/"
    chmod 644 "$share"/doc/kuasar/*.md
    licences kuasar-shim kuasar
    licences kuasar-guest-agent kuasar-guest
    crun_texts | zipped >"$work/kuasar-crun/usr/share/doc/kuasar-crun/THIRD-PARTY.gz"
    sources "$guest/manifest" >"$work/kuasar-guest/usr/share/doc/kuasar-guest/SOURCES"
    sources "$crun_manifest" >"$work/kuasar-crun/usr/share/doc/kuasar-crun/SOURCES"
}

# pack PACKAGE
pack() {
    local root=$work/$1 script
    install -d "$root/DEBIAN"
    for script in postinst prerm postrm; do
        [ ! -e "packaging/debian/$1.$script" ] || install -m 755 "packaging/debian/$1.$script" "$root/DEBIAN/$script"
    done
    # What dpkg treats as the administrator's.
    [ ! -d "$root/etc" ] || (cd "$root" && find etc -type f | sort | sed 's|^|/|') >"$root/DEBIAN/conffiles"
    (cd "$root" && find . -path ./DEBIAN -prune -o -path ./etc -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
    (cd "$work" && dpkg-gencontrol "-p$1" "-P$root" "-v$version" -cdebian/control -ldebian/changelog -Tdebian/substvars -fdebian/files \
        "-O$root/DEBIAN/control") 2>"$work/log" || { cat "$work/log" >&2; fail "dpkg-gencontrol does not take packaging/debian/control"; }
    # Times of unpacking and building are not part of it.
    find "$root" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    dpkg-deb --root-owner-group "-Z$compression" --build "$root" "$out" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "dpkg-deb did not build $1"; }
}

main() {
    local program commit
    SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(date_of_sources)}
    export SOURCE_DATE_EPOCH
    version=${DEB_VERSION:-$(version)}
    [ "$kernel" != --version ] || { say "$version"; return; }
    for program in dpkg-deb dpkg-gencontrol dpkg-shlibdeps gzip cargo rustc; do have "$program" || fail "no $program: run make deps"; done
    [ "$(dpkg --print-architecture)" = amd64 ] || fail "packages are built on amd64 only, this is $(dpkg --print-architecture)"
    [ -e "$guest/manifest" ] || fail "no guest image in $guest: run make guest KERNEL=$kernel"
    crun_manifest=$cache/bin/crun.manifest
    [ -e "$crun_manifest" ] || fail "no $crun_manifest: run make build. A crun that KUASAR_GUEST_CRUN names cannot be packed, because \
nothing tells its sources"
    [ -z "${KUASAR_GUEST_CRUN:-}" ] || fail "KUASAR_GUEST_CRUN is set: nothing tells the sources of that crun, which its licence wants told"
    [[ $(head -n 1 "$guest/manifest") =~ ^kernel\ linux-(image|source)- ]] ||
        fail "the kernel of $guest is not the distribution's: nothing tells its sources, which its licence wants told"
    commit=$(git_ rev-parse HEAD) || commit=
    dpkg --validate-version "$version" || fail "DEB_VERSION is no version"
    mkdir -p "$out"
    rm -f "$out"/kuasar_*_amd64.deb "$out"/kuasar-crun_*_amd64.deb "$out"/kuasar-guest_*_amd64.deb
    work=$(mktemp -d "$out/.work-XXXXXX")
    chmod 755 "$work"
    mkdir "$work/debian" "$work/kuasar" "$work/kuasar-crun" "$work/kuasar-guest"
    sed "s/\${maintainer}/$DEBFULLNAME <$DEBEMAIL>/" packaging/debian/control >"$work/debian/control"
    cat >"$work/debian/changelog" <<CHANGELOG
kuasar ($version) unstable; urgency=medium

  * Built from commit ${commit:-unknown}.
    changelog.gz tells what is new.

 -- $DEBFULLNAME <$DEBEMAIL>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
CHANGELOG
    stage
    say "crun:Built-Using=$(built_using "$crun_manifest")
guest:Built-Using=$(built_using "$guest/manifest"), $(source_of libc6-dev "$(dpkg-query -W -f '${Version}' libc6-dev)")" >"$work/debian/substvars"
    (cd "$work" && dpkg-shlibdeps -Tdebian/substvars -pshlibs kuasar/usr/bin/kuasard kuasar/usr/bin/kuasarctl \
        kuasar/usr/bin/containerd-shim-kuasar-v1) 2>"$work/log" || { cat "$work/log" >&2; fail "dpkg-shlibdeps does not know what kuasard needs"; }
    for program in kuasar kuasar-crun kuasar-guest; do pack "$program"; done
    for program in kuasar kuasar-crun kuasar-guest; do
        say "$(du -k "$out/${program}_${version}_amd64.deb" | cut -f 1) KiB  $out/${program}_${version}_amd64.deb"
    done
}

# In one piece, so that an edit meanwhile does no harm.
main
exit
