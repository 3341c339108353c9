#!/usr/bin/env bash
# Makes packages to test installing and upgrading with, uncompressed: scripts/deb-versions.sh DIRECTORY [KERNEL]
#
#   1/       those of this commit: kuasar, kuasar-crun, kuasar-guest
#   2/       kuasar once more as a newer version, with a changed configuration
#   broken/  kuasar as a version newer still, whose daemon does not start
. "$(dirname "$0")/lib.sh"

dir=$(realpath -m "$1")
kernel=${2:-cloud}

# variant NAME SUFFIX: kuasar with a version behind that of this commit
variant() {
    local tree=$dir/.tree-$1 version
    rm -rf "$tree"
    dpkg-deb -R "$dir"/1/kuasar_*.deb "$tree"
    version=$(sed -n 's/^Version: //p' "$tree/DEBIAN/control")
    sed -i "s/^Version: .*/Version: ${version%-*}.$2-1/" "$tree/DEBIAN/control"
    say '# new' >>"$tree/etc/kuasar/config.toml"
    [ "$1" != broken ] || printf '#!/bin/sh\necho broken >&2\nexit 1\n' >"$tree/usr/bin/kuasard"
    mkdir -p "$dir/$1"
    dpkg-deb --root-owner-group -Znone --build "$tree" "$dir/$1" >/dev/null
    rm -rf "$tree"
}

rm -rf "$dir"
mkdir -p "$dir/1"
DEB_COMPRESSION=none DEB_OUT=$dir/1 scripts/deb.sh "$kernel"
variant 2 next
variant broken then
