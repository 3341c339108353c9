# The distribution's packages, binary and source, taken apart without being installed; sourced, not run, after lib.sh.
#
# apt gets a state of its own in the cache, with the machine's sources as they are plus their source packages: nothing of the
# machine's configuration changes, and no root is needed. apt verifies what it fetches by the distribution's signatures.
# Versions are those of the lists in that state, which stay as they are until `make guest UPDATE=1`.

apt_state=$cache/apt
# Where a package is being fetched to; for the trap of who uses this.
apt_scratch=

# The address of Debian's archive: the machine's own, where that is Debian's.
debian_mirror() {
    local address=
    # shellcheck source=/dev/null
    if [ "$(. /etc/os-release && printf %s "${ID:-}")" = debian ]; then
        address=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT) $(SIGNED_BY)' 'Created-By: Packages' |
            awk '$2 == "main" && $1 !~ /security/ { print $1; exit }')
    fi
    printf %s "${address:-http://deb.debian.org/debian/}"
}

# Everything apt prints, for when it fails.
apt_log() {
    local status=0
    "$@" >"$apt_state/log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || { cat "$apt_state/log" >&2; return "$status"; }
}

# Whether nothing has changed since the last time: the usual case, and apt would take a second to say so.
apt_current() {
    [ -z "${UPDATE:-}" ] && [ -e "$apt_state/updated" ] && [ -e "$apt_state/apt.conf" ] &&
        [ -z "$(find /etc/apt/sources.list /etc/apt/sources.list.d -newer "$apt_state/apt.conf" 2>/dev/null)" ]
}

apt_prepare() {
    have apt-get && have dpkg-deb || fail "not a Debian system, so no packages of a kernel: set KUASAR_GUEST_KERNEL to a kernel \
with everything built in"
    ! apt_current || return 0
    local codename lines
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && printf %s "${VERSION_CODENAME:-}")
    # Only the distribution's own archives; others that the machine has are asked for nothing.
    lines=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(SIGNED_BY)' 'Created-By: Packages' |
        awk -v codename="$codename" '
            codename != "" && index($2, codename) == 1 && $3 ~ /^(main|universe)$/ {
                options = NF > 3 && $4 ~ /^\// ? "[signed-by=" $4 "] " : ""
                print "deb " options $1, $2, $3
                print "deb-src " options $1, $2, $3
            }' | sort -u)
    [ -n "$lines" ] || fail "apt knows no archive of $codename/main: see apt-get indextargets"
    apt_with "$lines"
}

# Makes the state one that knows these lines of sources.list(5) and no others.
apt_with() {
    local lines=$1
    mkdir -p "$apt_state/lists/partial" "$apt_state/cache/archives/partial"
    [ "$lines" = "$(cat "$apt_state/sources.list" 2>/dev/null)" ] || rm -f "$apt_state/updated"
    printf '%s\n' "$lines" >"$apt_state/sources.list"
    # Read after the machine's own configuration, so it has the last word. The caches, which some images switch off, make a look
    # into the lists ten times as fast.
    cat >"$apt_state/apt.conf" <<CONF
Dir::State "$apt_state";
Dir::State::lists "$apt_state/lists/";
Dir::Cache "$apt_state/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Etc::sourcelist "$apt_state/sources.list";
Dir::Etc::sourceparts "/dev/null";
CONF
    [ -z "${UPDATE:-}" ] || rm -f "$apt_state/updated"
    unset UPDATE
    [ -e "$apt_state/updated" ] || apt_update
}

apt_update() {
    say "fetching the distribution's package lists"
    rm -rf "$apt_state/known"
    # Without this, lists that cannot be fetched are a warning to it, and empty ones would be kept.
    apt_log apt-get -c "$apt_state/apt.conf" -o APT::Update::Error-Mode=any update -q ||
        fail "the package lists cannot be fetched (above): see to the network or /etc/apt/sources.list, and run it again"
    mkdir "$apt_state/known"
    touch "$apt_state/updated"
}

# What a question to the lists has been answered before, or else asks: known NAME COMMAND... Each takes apt half a second.
known() {
    local answer=$apt_state/known/$1
    shift
    [ -s "$answer" ] || "$@" >"$answer"
    cat "$answer"
}

# The version that would be installed of a package, or nothing.
apt_version() { known "version-$1" ask_version "$1"; }
ask_version() { apt-cache -c "$apt_state/apt.conf" policy "$1" | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'; }

# What a package that only stands for another one, as linux-image-cloud-amd64 does, depends on: apt_stands_for PACKAGE PREFIX
apt_stands_for() { known "behind-$1" ask_stands_for "$@"; }
ask_stands_for() {
    apt-cache -c "$apt_state/apt.conf" depends "$1" 2>/dev/null |
        awk -v prefix="$2" '$1 == "Depends:" && index($2, prefix) == 1 { print $2; exit }'
}

# Fetches a binary package and unpacks it: apt_unpack PACKAGE VERSION DIRECTORY
apt_unpack() {
    local package=$1 version=$2 to=$3
    apt_scratch=$(mktemp -d "$cache/.apt-XXXXXX")
    # apt drops root's powers for the download.
    chmod 777 "$apt_scratch"
    (cd "$apt_scratch" && apt_log apt-get -c "$apt_state/apt.conf" download -q "$package=$version") ||
        fail "$package $version could not be fetched: if the archive has a newer one by now, make guest UPDATE=1"
    mkdir -p "$to"
    dpkg-deb -x "$apt_scratch"/*.deb "$to"
    rm -rf "$apt_scratch"
    apt_scratch=
}

# The version of the source package that a name stands for, or nothing.
apt_source_version() { known "source-$1" ask_source_version "$1"; }
ask_source_version() {
    apt-get -c "$apt_state/apt.conf" source --print-uris --only-source -qq "$1" 2>/dev/null |
        sed -nE 's/.* [^ ]*_([^_ ]*)\.dsc .*/\1/p' | head -n 1
}

# Fetches a source package and unpacks it, patches applied: apt_source PACKAGE DIRECTORY. Fails where the archive lacks a file of it.
apt_source() {
    local package=$1 to=$2 status=0
    apt_scratch=$(mktemp -d "$cache/.apt-XXXXXX")
    chmod 777 "$apt_scratch"
    { (cd "$apt_scratch" && apt_log apt-get -c "$apt_state/apt.conf" source -q --only-source --download-only "$package") &&
        apt_log dpkg-source --no-check -x "$apt_scratch"/*.dsc "$to"; } || status=1
    rm -rf "$apt_scratch"
    apt_scratch=
    return "$status"
}

# The same without the distribution's patches, from the original alone, for archives that have only some of a package's files:
# apt_original PACKAGE DIRECTORY. The checksum is that of the signed list.
apt_original() {
    local uri file sum status=0
    read -r uri file sum < <(apt-get -c "$apt_state/apt.conf" source --print-uris --only-source -qq "$1" 2>/dev/null |
        tr -d "'" | awk '$2 ~ /\.orig\.tar\.[a-z0-9]+$/ { print $1, $2, $4 }') || return 1
    apt_scratch=$(mktemp -d "$cache/.apt-XXXXXX")
    chmod 777 "$apt_scratch"
    mkdir -p "$2"
    { apt_log /usr/lib/apt/apt-helper -c "$apt_state/apt.conf" download-file "$uri" "$apt_scratch/$file" "$sum" &&
        tar -C "$2" --strip-components=1 -xf "$apt_scratch/$file"; } || status=1
    rm -rf "$apt_scratch"
    apt_scratch=
    return "$status"
}
