#!/usr/bin/env bash
# Tests the packages that scripts/deb.sh builds: what is in them, and what installing, upgrading, removing and purging them does in a
# Debian of their own, which has no systemd. Where systemd is told something there, a program notes what.
#
# The Debian is made once, in $KUASAR_CACHE/deb-root; UPDATE=1 makes it anew.
. "$(dirname "$0")/lib.sh"
. scripts/apt.sh
. scripts/cases.sh

update=${UPDATE:-}
unset UPDATE DEB_VERSION DEB_OUT
export LC_ALL=C
release=$(realpath -m "$target")/release
scratch=$(mktemp -d /var/tmp/kuasar-deb-test-XXXXXX)
base=$scratch/base
# What ends takes its mounts with it, since it has namespaces of its own.
trap 'rm -rf --one-file-system "$scratch"' EXIT
trap 'exit 130' INT TERM

# Whether a text has words, and the text if not: has WORDS TEXT
has() { grep -qF -- "$1" <<<"$2" || { say "no \"$1\" in: $2"; return 1; }; }
# Whether grep finds nothing: lacks_line HOW PATTERN TEXT
lacks_line() { ! grep "$1" -- "$2" <<<"$3" || return 1; }

# The Debian, without packages of ours.
make_base() {
    local codename tar
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && say "$VERSION_CODENAME")
    tar=$cache/deb-root/$codename.tar
    [ -z "$update" ] || rm -f "$tar"
    if [ ! -e "$tar" ]; then
        apt_prepare
        mkdir -p "$cache/deb-root"
        say "making a Debian $codename for the packages, once"
        grep '^deb ' "$apt_state/sources.list" | mmdebstrap --quiet --variant=minbase "$codename" "${tar%/*}/.new-$codename.tar" - >"$scratch/log" 2>&1 ||
            { cat "$scratch/log" >&2; fail "mmdebstrap made no Debian $codename (above)"; }
        mv "${tar%/*}/.new-$codename.tar" "$tar"
    fi
    mkdir "$base"
    tar -C "$base" -xf "$tar"
    mkdir -p "$base/opt/tools" "$base/packages" "$base/etc/containerd"
}

# Becomes the root filesystem of a command, with namespaces that end with it.
enter=$(cat <<'ENTER'
set -eu
root=$1 packages=$2 tools=$3
shift 3
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
mount --bind "$packages" "$root/packages"
mount --bind "$tools" "$root/opt/tools"
cd "$root"
mkdir -p .host
pivot_root . .host
umount -l /.host
cd /
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"
ENTER
)

# Runs a script in a fresh copy of the Debian: within SCRIPT. Functions for it are in $helpers.
within() {
    local root
    root=$(mktemp -d "$scratch/root-XXXXXX")
    cp -a --reflink=auto "$base/." "$root/"
    timeout 120 unshare --mount --pid --fork --kill-child --uts --ipc --propagation private bash -c "$enter" enter "$root" "$scratch/packages" "$cache/bin" \
        bash -euo pipefail -c "$helpers
trap 'echo \"line \$LINENO: \$BASH_COMMAND\"' ERR
$1"
}

helpers=$(cat <<'HELPERS'
apt() { apt-get -qq -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root --no-install-recommends "$@" </dev/null 2>&1; }
install() { apt install -y -o Dpkg::Options::=--force-confold "$@"; }
first() { install /packages/1/kuasar_*.deb /packages/1/kuasar-crun_*.deb; }
has() { grep -qF -- "$1" <<<"$2" || { echo "no \"$1\" in: $2"; exit 1; }; }
lacks() { ! grep -F -- "$1" <<<"$2" || exit 1; }
# Whether removing is refused, in $out with which words.
refused() { if out=$(apt remove -y "$@"); then echo "$* was removed: $out"; exit 1; fi; }
status() { dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null; }
# kuasard without a service manager, as the package has it.
daemon() {
    PATH=/opt/tools:$PATH kuasard >/tmp/kuasard.log 2>&1 &
    for _ in $(seq 300); do kuasarctl version >/dev/null 2>&1 && return; sleep 0.1; done
    cat /tmp/kuasard.log; echo "kuasard does not serve"; exit 1
}
pid() { kuasarctl --json version | sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p" | tail -n 1; }
# A pod of kuasar-runc, which containerd makes without an image.
pod() {
    mkdir -p /etc/containerd/conf.d
    printf 'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n[plugins."io.containerd.cri.v1.runtime"]\nrestrict_oom_score_adj = true\n' >/etc/containerd/config.toml
    PATH=/opt/tools:$PATH kuasarctl containerd-config >/etc/containerd/conf.d/kuasar.toml
    PATH=/opt/tools:$PATH containerd >/tmp/containerd.log 2>&1 &
    for _ in $(seq 300); do crictl info >/dev/null 2>&1 && break; sleep 0.1; done
    echo '{"metadata":{"name":"web","namespace":"shop","uid":"u","attempt":0},"log_directory":"/tmp","linux":{"security_context":{"namespace_options":{"network":2}}}}' >/tmp/pod.json
    pod=$(crictl runp --runtime kuasar-runc /tmp/pod.json) || { tail -n 20 /tmp/containerd.log; exit 1; }
}
crictl() { /opt/tools/crictl --timeout 30s --runtime-endpoint unix:///run/containerd/containerd.sock "$@"; }
# As if systemd ran: notes what it is told.
systemd() {
    mkdir -p /run/systemd/system
    : >/tmp/systemctl.log
    cat >/usr/bin/systemctl <<'SYSTEMCTL'
#!/bin/sh
echo "$*" >>/tmp/systemctl.log
case "$*" in
*is-enabled*) echo enabled ;;
*is-active*) [ -e /tmp/active ] ;;
*LoadState*) echo LoadState=loaded ;;
esac
SYSTEMCTL
    chmod 755 /usr/bin/systemctl
}
HELPERS
)

versions() {
    local repository=$scratch/versions of=() n
    mkdir -p "$repository"
    cp -r Cargo.toml scripts "$repository/"
    cd "$repository"
    git init -q
    commit() { git -c user.name=n -c user.email=e@example.org commit -q --allow-empty -m m --date "$1"; }
    told() { of+=("$(unset SOURCE_DATE_EPOCH; scripts/deb.sh --version)"); }
    git add -A
    for n in 1 2 3 4; do
        GIT_COMMITTER_DATE="2026-01-0${n}T00:00:00Z" commit "2026-01-0${n}T00:00:00Z"
        [ "$n" != 3 ] || git tag "v$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)"
        told
    done
    say '# changed' >>Cargo.toml
    told
    say "${of[*]}"
    for n in 1 2 3 4; do dpkg --compare-versions "${of[n - 1]}" lt "${of[n]}"; done
    [[ ${of[2]} =~ ^[0-9.]+-1$ ]]
}

same_bytes() {
    local name
    DEB_COMPRESSION=none SOURCE_DATE_EPOCH=1700000000 DEB_VERSION=1-1 DEB_OUT=$scratch/again/a scripts/deb.sh
    DEB_COMPRESSION=none SOURCE_DATE_EPOCH=1700000000 DEB_VERSION=1-1 DEB_OUT=$scratch/again/b scripts/deb.sh
    for name in "$scratch"/again/a/*.deb; do cmp "$name" "$scratch/again/b/${name##*/}"; done
    rm -rf "$scratch/again"
}

no_errors_of_lintian() {
    have lintian || { say "SKIP no lintian: scripts/deps.sh deb installs it"; return; }
    # Packed without compression for the sake of time.
    lintian --allow-root --fail-on error,warning --suppress-tags uses-no-compression-for-control-tarball,uses-no-compression-for-data-tarball \
        "$scratch"/packages/1/*.deb
}

contents() {
    local list
    list=$(for name in "$scratch"/packages/1/*.deb; do dpkg-deb -c "$name"; done | awk '{ print $1, $2, $6, $7, $8 }' | sed 's/ *$//')
    for line in \
        '-rwxr-xr-x root/root ./usr/bin/kuasard' \
        '-rwxr-xr-x root/root ./usr/bin/kuasarctl' \
        '-rwxr-xr-x root/root ./usr/bin/containerd-shim-kuasar-v1' \
        'lrwxrwxrwx root/root ./usr/bin/containerd-shim-kuasar-runc-v1 -> containerd-shim-kuasar-v1' \
        'lrwxrwxrwx root/root ./usr/bin/containerd-shim-kuasar-crun-v1 -> containerd-shim-kuasar-v1' \
        'lrwxrwxrwx root/root ./usr/bin/containerd-shim-kuasar-qemu-v1 -> containerd-shim-kuasar-v1' \
        '-rwxr-xr-x root/root ./usr/libexec/kuasar/crun' \
        '-rw-r--r-- root/root ./usr/share/kuasar/guest/vmlinuz' \
        '-rw-r--r-- root/root ./usr/share/kuasar/guest/initrd' \
        '-rw-r--r-- root/root ./usr/share/kuasar/guest/initrd-debug' \
        '-rw-r--r-- root/root ./etc/kuasar/config.toml' \
        'drwxr-xr-x root/root ./etc/kuasar/conf.d/' \
        '-rw-r--r-- root/root ./usr/lib/systemd/system/kuasard.service' \
        '-rw-r--r-- root/root ./usr/share/bash-completion/completions/kuasarctl' \
        '-rw-r--r-- root/root ./usr/share/zsh/vendor-completions/_kuasarctl' \
        '-rw-r--r-- root/root ./usr/share/fish/vendor_completions.d/kuasarctl.fish' \
        '-rw-r--r-- root/root ./usr/share/man/man8/kuasard.8.gz'; do
        grep -qxF -- "$line" <<<"$list" || { say "not in the packages: $line"; return 1; }
    done
    # Of root, writable by nobody else, with no powers of its own, and nowhere but where packages may have something.
    lacks_line -vE '^[-d]rw[x-]r-[x-]r-[x-] root/root |^lrwxrwxrwx root/root ' "$list"
    lacks_line -E ' \./(usr/local|opt|var|run|lib|bin|sbin)/' "$list"
    lacks_line -F /usr/local "$(dpkg-deb --fsys-tarfile "$scratch"/packages/1/kuasar_*.deb | tar -xO ./etc/kuasar/config.toml ./usr/lib/systemd/system/kuasard.service)"
}

manual_pages() {
    have man || { say "SKIP no man: scripts/deps.sh deb installs it"; return; }
    local dir=$scratch/pages page warnings command
    mkdir "$dir"
    dpkg-deb --fsys-tarfile "$scratch"/packages/1/kuasar_*.deb | tar -C "$dir" -x ./usr/share/man
    for page in "$dir"/usr/share/man/man8/*; do
        warnings=$(MANROFFSEQ='' MANWIDTH=80 LC_ALL=C.UTF-8 man --warnings -E UTF-8 -l -Tutf8 -Z "$page" 2>&1 >/dev/null)
        [ -z "$warnings" ] || { say "$page: $warnings"; return 1; }
    done
    for command in $("$release/kuasarctl" --help | awk '/^Commands:/ { on = 1; next } /^$/ { on = 0 } on && /^  [a-z]/ { print $1 }'); do
        [ "$command" = help ] || [ -e "$dir/usr/share/man/man8/kuasarctl-$command.8.gz" ] || { say "no page for kuasarctl $command"; return 1; }
    done
}

completions() {
    local dir=$scratch/completions
    mkdir "$dir"
    dpkg-deb --fsys-tarfile "$scratch"/packages/1/kuasar_*.deb | tar -C "$dir" -x ./usr/share/bash-completion
    bash -euc ". '$dir/usr/share/bash-completion/completions/kuasarctl'
        COMP_WORDS=(kuasarctl up) COMP_CWORD=1
        _kuasarctl kuasarctl up kuasarctl
        [ \"\${COMPREPLY[*]}\" = upgrade ]"
}

# Everything that is linked or bundled is named, with what the licences want.
licences() {
    local text name
    for name in kuasar:kuasar-shim kuasar-guest:kuasar-guest-agent; do
        text=$(dpkg-deb --fsys-tarfile "$scratch"/packages/1/"${name%%:*}"_*.deb | tar -xO "./usr/share/doc/${name%%:*}/THIRD-PARTY.gz" | zcat)
        cargo tree --locked -p "${name#*:}" -e normal,no-proc-macro --target x86_64-unknown-linux-gnu --prefix none --format '{p}' |
            sed -n '/(\//d; s/^\([^ ]*\) v\([^ ]*\).*/\1 \2 /p' | sort -u >"$scratch/linked"
        [ "$(wc -l <"$scratch/linked")" -gt 5 ]
        while read -r crate; do has "$crate " "$text"; done <"$scratch/linked"
        has 'Permission is hereby granted' "$text"
    done
    text=$(dpkg-deb -f "$scratch"/packages/1/kuasar-guest_*.deb Built-Using)
    for name in linux crun libseccomp glibc busybox; do has "$name (= " "$text"; done
    text=$(dpkg-deb -f "$scratch"/packages/1/kuasar-crun_*.deb Built-Using)
    for name in crun libseccomp glibc libcap2; do has "$name (= " "$text"; done
}

installed() {
    within '
        out=$(first)
        [ "$(status kuasar)$(status kuasar-crun)" = "ii ii " ]
        [ -L /etc/systemd/system/multi-user.target.wants/kuasard.service ]
        # No systemd, so nothing was started.
        [ ! -e /run/kuasar ]
        kuasard --version && kuasarctl config >/dev/null && containerd-shim-kuasar-runc-v1 -v && /usr/libexec/kuasar/crun --version
        out=$(install /packages/1/kuasar-guest_*.deb)
        printf "[sandboxer.kuasar-qemu]\nkind = \"vmm\"\nhypervisor = \"qemu\"\n" >/etc/kuasar/conf.d/q.toml
        # It finds what is installed with it: what it lacks is QEMU.
        lacks /usr/local/share "$(kuasarctl check)"
        dpkg --verify kuasar kuasar-crun kuasar-guest'
}

configuration() {
    within '
        first >/dev/null
        install /packages/2/kuasar_*.deb >/dev/null
        # Untouched, it is replaced.
        tail -n 1 /etc/kuasar/config.toml | grep -qx "# new"
        [ ! -e /etc/kuasar/config.toml.dpkg-dist ]
        dpkg --purge kuasar >/dev/null 2>&1
        first >/dev/null
        echo "# mine" >>/etc/kuasar/config.toml
        printf "[log]\nlevel = \"debug\"\n" >/etc/kuasar/conf.d/log.toml
        install /packages/2/kuasar_*.deb >/dev/null
        tail -n 1 /etc/kuasar/config.toml | grep -qx "# mine"
        tail -n 1 /etc/kuasar/config.toml.dpkg-dist | grep -qx "# new"
        kuasarctl config | grep -q debug
        apt remove -y kuasar >/dev/null
        [ -e /etc/kuasar/config.toml ] && [ -e /etc/kuasar/conf.d/log.toml ] && [ ! -e /usr/bin/kuasard ]
        [ "$(status kuasar)" = "rc " ]'
}

names_of_sandboxers() {
    within '
        mkdir -p /etc/kuasar/conf.d
        printf "[sandboxer.kuasar-runc]\nkind = \"runc\"\n[sandboxer.other]\nkind = \"runc\"\nruntime = \"runc\"\n" >/etc/kuasar/conf.d/other.toml
        ln -s elsewhere /usr/bin/containerd-shim-mine-v1
        first >/dev/null
        [ "$(readlink /usr/bin/containerd-shim-other-v1)" = containerd-shim-kuasar-v1 ]
        apt remove -y kuasar >/dev/null
        [ ! -L /usr/bin/containerd-shim-other-v1 ] && [ ! -L /usr/bin/containerd-shim-kuasar-runc-v1 ]
        [ -L /usr/bin/containerd-shim-mine-v1 ]'
}

# A pod runs on through an upgrade; it keeps the package from being removed; once it is gone, nothing does.
under_a_pod() {
    [ -x "$cache/bin/containerd" ] && [ -x "$cache/bin/crictl" ] && [ -x "$cache/bin/runc" ] ||
        { say "SKIP no containerd, crictl or runc in $cache/bin: make deps builds them"; return; }
    within '
        first >/dev/null
        daemon
        pod
        keeper=$(pid keeper_pid) worker=$(pid pid)
        out=$(install /packages/2/kuasar_*.deb)
        has "is now" "$out"
        [ "$(pid keeper_pid)" = "$keeper" ] && [ "$(pid pid)" != "$worker" ]
        crictl pods -q --no-trunc --state ready | grep -q "$pod"
        worker=$(pid pid)
        out=$(install /packages/broken/kuasar_*.deb)
        has "could not be replaced" "$out"
        has "kuasarctl upgrade" "$out"
        [ "$(status kuasar)" = "ii " ]
        [ "$(pid keeper_pid)" = "$keeper" ]
        crictl pods -q --no-trunc --state ready | grep -q "$pod"
        install --allow-downgrades /packages/2/kuasar_*.deb >/dev/null
        refused kuasar
        has "pods run here" "$out"
        has shop/web "$out"
        has KUASAR_REMOVE_ANYWAY=1 "$out"
        [ "$(status kuasar)" = "ii " ] && [ -x /usr/bin/kuasard ]
        # Nor with what kuasar needs.
        refused kuasar-crun
        [ "$(status kuasar-crun)" = "ii " ]
        crictl rmp -f "$pod" >/dev/null
        out=$(apt remove -y kuasar)
        has "still leads containerd to kuasar" "$out"
        has "kuasard still runs" "$out"
        [ ! -e /usr/bin/kuasard ]
        kill "$keeper"'
}

removed_without_a_daemon() {
    within '
        first >/dev/null
        mkdir -p /run/kuasar/sandboxes/k8s.io/0123 /var/lib/kuasar/x
        refused kuasar
        has "kuasard does not answer" "$out"
        has /run/kuasar/sandboxes/k8s.io/0123 "$out"
        [ "$(status kuasar)" = "ii " ]
        out=$(KUASAR_REMOVE_ANYWAY=1 apt remove -y kuasar)
        has "run on without kuasard" "$out"
        [ -d /run/kuasar/sandboxes ] && [ -d /var/lib/kuasar ]'
}

purged() {
    within '
        first >/dev/null
        mkdir -p /run/kuasar/runc /var/lib/kuasar/x /etc/containerd/conf.d
        touch /etc/containerd/conf.d/kuasar.toml /etc/kuasar/conf.d/mine.toml
        out=$(apt purge -y kuasar kuasar-crun)
        [ ! -e /run/kuasar ] && [ ! -e /var/lib/kuasar ] && [ ! -e /etc/kuasar ]
        [ ! -e /etc/systemd/system/multi-user.target.wants/kuasard.service ]
        [ -e /etc/containerd/conf.d/kuasar.toml ]
        [ -z "$(status kuasar)$(status kuasar-crun)" ]
        [ -z "$(find / -xdev -name "*kuasar*" -not -path "/packages/*" -not -path /etc/containerd/conf.d/kuasar.toml)" ]'
}

# What pods have mounted below the state directory is theirs.
purged_beside_mounts() {
    within '
        first >/dev/null
        mkdir -p /run/kuasar/volume /srv/data /var/lib/kuasar
        touch /srv/data/precious
        mount --bind /srv/data /run/kuasar/volume
        out=$(apt purge -y kuasar)
        has "/run/kuasar is left" "$out"
        [ -e /srv/data/precious ] && [ ! -e /var/lib/kuasar ]'
}

beside_one_made_by_hand() {
    within '
        mkdir -p /usr/local/lib/systemd/system
        sed s,/usr/bin,/usr/local/bin, <<<"ExecStart=/usr/bin/kuasard --config x" >/etc/systemd/system/kuasard.service
        printf "#!/bin/sh\nexit 1\n" >/usr/local/bin/kuasard
        chmod 755 /usr/local/bin/kuasard
        ln -s kuasard /usr/local/bin/containerd-shim-kuasar-runc-v1
        out=$(first)
        has "/etc/systemd/system/kuasard.service goes before this package'"'"'s unit and runs /usr/local/bin/kuasard" "$out"
        has "search paths: /usr/local/bin/kuasard /usr/local/bin/containerd-shim-kuasar-runc-v1." "$out"
        has "kuasarctl upgrade --binary /usr/bin/kuasard" "$out"
        [ -e /usr/local/bin/kuasard ] && [ -e /etc/systemd/system/kuasard.service ]'
}

# systemd is told to start the service once, to stop it at removal, and never both for an upgrade: before version 254 that costs every
# container.
told_to_systemd() {
    within '
        systemd
        first >/dev/null
        has "start kuasard.service" "$(cat /tmp/systemctl.log)"
        lacks stop "$(cat /tmp/systemctl.log)"
        : >/tmp/systemctl.log
        touch /tmp/active
        out=$(install /packages/2/kuasar_*.deb)
        has "does not answer" "$out"
        has daemon-reload "$(cat /tmp/systemctl.log)"
        for word in " start" stop restart; do lacks "$word" "$(cat /tmp/systemctl.log)"; done
        daemon
        : >/tmp/systemctl.log
        out=$(install --reinstall /packages/2/kuasar_*.deb)
        has "is now" "$out"
        for word in " start" stop restart; do lacks "$word" "$(cat /tmp/systemctl.log)"; done
        kill "$(pid keeper_pid)"
        : >/tmp/systemctl.log
        apt remove -y kuasar >/dev/null
        has "stop kuasard.service" "$(cat /tmp/systemctl.log)"
        for word in " start" restart; do lacks "$word" "$(cat /tmp/systemctl.log)"; done'
}

[ "$(id -u)" -eq 0 ] || fail "this needs root: it makes namespaces and installs packages in them"
have mmdebstrap || fail "no mmdebstrap: scripts/deps.sh deb installs it"
make_base
scripts/deb-versions.sh "$scratch/packages"
tests=(versions same_bytes no_errors_of_lintian contents manual_pages completions licences installed configuration names_of_sandboxers under_a_pod
    removed_without_a_daemon purged purged_beside_mounts beside_one_made_by_hand told_to_systemd)
[ $# -eq 0 ] || tests=("$@")
for test in "${tests[@]}"; do it "$test" "$test"; done

sum_up
