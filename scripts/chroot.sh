#!/bin/bash
# chroot.sh: makes build/chroots/SUITE with the newer CPythons of Debian's next release, for the live tests.
#
# A folder to chroot into, with interpreters that this system has no package of, and the libraries
# that these need: packages downloaded and unpacked, with nothing configured. apt works with a
# state, cache and sources of its own there, so the system's packages and lists stay as they are.
# Prints the folder. Run again, it only looks. No debootstrap: that takes minutes, this 10 seconds.
# Status 77: this system has no way to these packages, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITES='forky sid'
VERSIONS='3.14 3.15'
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
FOLDER=build/chroots
UNAVAILABLE=77

fail() {
    echo "chroot: $*" >&2
    exit 1
}

unavailable() {
    echo "chroot: $*" >&2
    exit $UNAVAILABLE
}

identity=$(sha256sum <"scripts/chroot.sh")
for suite in $SUITES; do
    if [ "$(cat "$FOLDER/$suite/.complete" 2>/dev/null)" = "$identity" ]; then
        echo "$FOLDER/$suite"
        exit 0
    fi
done

for tool in apt-get apt-config dpkg; do
    command -v $tool >/dev/null ||
        unavailable "cannot get CPython ${VERSIONS// / and }: there is no $tool here," \
            "and they come as packages of Debian"
done
[ -r $KEYRING ] ||
    unavailable "cannot get CPython ${VERSIONS// / and }: $KEYRING is missing;" \
        "install debian-archive-keyring"

# The mirror that this system uses itself. Without lists apt does not know whose it is.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN) $(CODENAME)' 'Created-By: Packages' |
    awk '($2 == "Debian" && $3 !~ /-/) || $1 ~ /\/debian\/?$/ { print $1; exit }')
[ -n "$mirror" ] ||
    unavailable "cannot get CPython ${VERSIONS// / and }: apt's sources name no mirror of Debian"

mkdir -p $FOLDER
work=$(mktemp -d "$PWD/$FOLDER/.making.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists,cache/archives}/partial
: >"$work/status"
# apt gives up root for downloads, and that user has to get here; a checkout in /root does not let it.
options=(-qq -o "Dir::State=$work" -o "Dir::State::status=$work/status" -o "Dir::Cache=$work/cache"
    -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
    -o Acquire::Languages=none -o "APT::Sandbox::User=$(id -un)" -o "DPkg::Post-Invoke="
    -o APT::Update::Post-Invoke= -o APT::Update::Post-Invoke-Success=)
log=$work/log

# Which suite there is, and has them all: apt takes the word of a mirror that says "404" for one.
unpack() {
    local suite=$1 root=$work/root version package packages=()
    for version in $VERSIONS; do packages+=("python$version" "libpython$version-testsuite"); done
    echo "deb [signed-by=$KEYRING] $mirror $suite main" >"$work/sources.list"
    rm -rf "$work/lists" && mkdir -p "$work/lists/partial"
    apt-get "${options[@]}" update >"$log" 2>&1 || return 1
    apt-get "${options[@]}" install --yes --no-install-recommends --download-only \
        "${packages[@]}" </dev/null >"$log" 2>&1 || return 1
    # What base-files would bring: everything is under /usr.
    mkdir -p "$root"/{usr/{bin,sbin,lib,lib64},dev,proc,tmp,etc}
    for package in bin sbin lib lib64; do ln -s "usr/$package" "$root/$package"; done
    for package in "$work"/cache/archives/*.deb; do
        dpkg --extract "$package" "$root" || return 1
    done
}

for suite in $SUITES; do
    unpack "$suite" || continue
    echo "$identity" >"$work/root/.complete"
    rm -rf "${FOLDER:?}/$suite"
    mv "$work/root" "$FOLDER/$suite"
    echo "$FOLDER/$suite"
    exit 0
done
cat "$log" >&2
if grep -qE 'does not have a Release file|Unable to locate package|has no installation candidate' "$log"; then
    unavailable "cannot get CPython ${VERSIONS// / and }: $mirror has none in ${SUITES// / or } (see above)"
fi
fail "cannot get CPython ${VERSIONS// / and } from $mirror: apt-get failed (see above);" \
    "check the network, then run make test again"
