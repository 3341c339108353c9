#!/usr/bin/env bash
# Builds the image of a node, a Debian machine with systemd, into $KUASAR_CACHE/node/<suite>: scripts/node.sh [trixie|bookworm]
#
#   disk         its file system, 12 GB, sparse; a run writes to an overlay of its own
#   vmlinuz      the distribution's kernel for virtual machines
#   initrd       busybox and the modules that the disk needs
#   key          the key that its root lets in
#   known_hosts  its own
#   manifest     what went in: the digest of this script and of tests/node/, and each package with its version
#
# Packages come from the machine's own mirror, where that is Debian's. Nothing of the machine changes: what is mounted is in a mount
# namespace of its own. The image is built anew when the digest changes, or by UPDATE=1, which brings newer packages.
. "$(dirname "$0")/lib.sh"
. scripts/apt.sh

suite=${1:-trixie}
update=${UPDATE:-}
images=$cache/node
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
disk_size=12G
# For the disk, on a machine of QEMU's; virtio_net is loaded by udev.
modules=(virtio_pci virtio_blk ext4)
# Profiles of AppArmor that are kept: each takes half a second of an emulated machine's boot, and Debian has a hundred.
profiles=(crun runc unix-chkpwd virtiofsd)
# Of no use there, or slow in an emulated machine.
masked=(apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
    getty@tty1.service serial-getty@ttyS0.service systemd-networkd-wait-online.service systemd-network-generator.service
    systemd-firstboot.service systemd-pcrphase.service systemd-pcrphase-sysinit.service)

export LC_ALL=C TZ=UTC
umask 022
scratch=
trap 'rm -rf ${scratch:+"$scratch"}' EXIT
trap 'exit 130' INT TERM

digest() { sha256sum | cut -c 1-16; }
inputs() { find tests/node scripts/node.sh -type f -print0 | sort -z | xargs -0 sha256sum | digest; }
packages() { sed 's/#.*//' tests/node/packages | awk -v suite="$suite" 'NF == 1 { print $1 } NF > 1 { for (i = 2; i <= NF; i++) if ($i == suite) print $1 }'; }

# What mmdebstrap is given of the machine's own settings.
apt_options() {
    ! apt-config dump | grep -qi '^Acquire::Check-Valid-Until "\(false\|0\|no\)"' || say 'Acquire::Check-Valid-Until "false"'
}

# The packages, unpacked and configured, in $scratch/root, and the kernel's in $scratch/kernel.
install_packages() {
    local option arguments=()
    while read -r option; do arguments+=("--aptopt=$option"); done < <(apt_options)
    # shellcheck disable=SC2016
    unshare --mount --pid --fork --kill-child mmdebstrap --quiet --mode=root --variant=apt --components=main \
        --include="$(packages | paste -sd ,)" --keyring="$keyring" "${arguments[@]}" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --customize-hook='chroot "$1" sh -ec "cd /var/tmp && apt-get download -qq \$(apt-cache depends linux-image-cloud-amd64 | sed -n \"s/.*Depends: \\(linux-image-[^ ]*\\).*/\\1/p\" | head -n 1)"' \
        "$suite" "$scratch/root" "deb [signed-by=$keyring] $(debian_mirror) $suite main" >"$scratch/log" 2>&1 || {
        tail -n 30 "$scratch/log" >&2
        fail "the packages of $suite could not be installed into a directory (above)"
    }
    dpkg-deb -x "$scratch"/root/var/tmp/linux-image-*.deb "$scratch/kernel"
    rm "$scratch"/root/var/tmp/linux-image-*.deb
}

# The kernel is unpacked, not installed: its scripts would make an initrd of everything.
install_kernel() {
    local tree=$scratch/kernel lib
    version=$(cd "$tree/boot" && ls vmlinuz-*)
    version=${version#vmlinuz-}
    cp "$tree/boot/vmlinuz-$version" "$scratch/out/vmlinuz"
    cp "$tree/boot/config-$version" "$scratch/root/boot/"
    for lib in "$tree/usr/lib/modules" "$tree/lib/modules"; do
        [ ! -d "$lib" ] || { mkdir -p "$scratch/root/usr/lib/modules" && mv "$lib/$version" "$scratch/root/usr/lib/modules/"; }
    done
    depmod -b "$scratch/root" "$version"
    rm -rf "$tree"
}

make_initrd() {
    local tree=$scratch/initrd module path number=10
    mkdir -p "$tree"/{bin,dev,modules,proc,root,sys}
    install -m 755 /bin/busybox "$tree/bin/busybox"
    for module in sh mount umount insmod sleep switch_root poweroff echo; do ln -s busybox "$tree/bin/$module"; done
    install -m 755 tests/node/initrd-init "$tree/init"
    for module in "${modules[@]}"; do
        while read -r path; do
            [ -z "$(find "$tree/modules" -name "*-$(basename "${path%.xz}")")" ] || continue
            case $path in
            *.xz) xz -dc "$path" >"$tree/modules/$number-$(basename "${path%.xz}")" ;;
            *) cp "$path" "$tree/modules/$number-$(basename "$path")" ;;
            esac
            number=$((number + 1))
        done < <(modprobe -d "$scratch/root" -S "$version" --show-depends "$module" | awk '$1 == "insmod" { print $2 }')
    done
    (cd "$tree" && find . | sort | cpio --quiet -o -H newc) >"$scratch/out/initrd"
}

configure() {
    local root=$scratch/root unit profile file keep
    cp -r tests/node/files/. "$root/"
    say node >"$root/etc/hostname"
    say "127.0.0.1 localhost node" >"$root/etc/hosts"
    # systemd takes a machine without for one that boots for the first time, and sets up all units anew.
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    mkdir -p "$root/var/log/journal"
    rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/resolv.conf"
    ssh-keygen -q -t ed25519 -N '' -C node -f "$root/etc/ssh/ssh_host_ed25519_key"
    ssh-keygen -q -t ed25519 -N '' -C node -f "$scratch/out/key"
    say "node $(cut -d ' ' -f 1,2 "$root/etc/ssh/ssh_host_ed25519_key.pub")" >"$scratch/out/known_hosts"
    install -D -m 600 "$scratch/out/key.pub" "$root/root/.ssh/authorized_keys"
    chmod 700 "$root/root/.ssh"
    rm "$scratch/out/key.pub"
    for unit in "${masked[@]}"; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
    mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
    ln -sf /usr/lib/systemd/system/systemd-networkd.service "$root/etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
    keep=" ${profiles[*]} "
    for file in "$root"/etc/apparmor.d/*; do
        profile=${file##*/}
        [ -d "$file" ] || [[ $keep == *" $profile "* ]] || rm "$file"
    done
    # Units that look whether /usr is newer than these have nothing to do.
    touch "$root/etc/.updated" "$root/var/.updated"
}

make_disk() {
    truncate -s "$disk_size" "$scratch/out/disk"
    mke2fs -q -t ext4 -L node -m 0 -E lazy_itable_init=1,root_owner=0:0 -d "$scratch/root" "$scratch/out/disk"
}

write_manifest() {
    say "inputs $(inputs)"
    say "kernel $version"
    dpkg-query --admindir="$scratch/root/var/lib/dpkg" -W -f '${Package} ${Version}\n'
}

build() {
    local program
    [ "$(id -u)" -eq 0 ] || fail "an image of a machine has files of many owners: run as root"
    for program in mmdebstrap mke2fs busybox cpio depmod ssh-keygen xz unshare; do have "$program" || fail "no $program: run make deps"; done
    scratch=$(mktemp -d "$images/.build-XXXXXX")
    mkdir "$scratch/out"
    install_packages
    install_kernel
    make_initrd
    configure
    make_disk
    write_manifest >"$scratch/out/manifest"
    chmod 755 "$scratch/out"
    # In one step: what runs has the files of the one before open.
    local to before
    to=$images/$suite-$(inputs)-$(date +%s)
    before=$(readlink -f "$images/$suite" || true)
    mv "$scratch/out" "$to"
    ln -s "${to##*/}" "$scratch/link"
    mv -Tf "$scratch/link" "$images/$suite"
    [ -z "$before" ] || [ "$before" = "$images/$suite" ] || rm -rf "$before"
    rm -rf "$scratch"
    scratch=
}

main() {
    case $suite in
    trixie | bookworm) ;;
    *) fail "no node of suite $suite: trixie, bookworm" ;;
    esac
    [ "$(uname -m)" = x86_64 ] || fail "nodes are built on x86_64 only, this is $(uname -m)"
    [ -e "$keyring" ] || fail "no $keyring: run make deps"
    mkdir -p "$images"
    exec 9>"$images/.lock-$suite"
    flock 9
    if [ -z "$update" ] && [ "$(head -n 1 "$images/$suite/manifest" 2>/dev/null)" = "inputs $(inputs)" ]; then
        return 0
    fi
    timed "building a node of $suite" -- build
    say "$images/$suite: disk $(du -m "$images/$suite/disk" | cut -f 1) MiB, initrd $(du -k "$images/$suite/initrd" | cut -f 1) KiB"
}

# It takes a minute, and bash reads a script as it goes: in one piece, so that an edit meanwhile does no harm.
main
exit
