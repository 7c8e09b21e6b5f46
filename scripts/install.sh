#!/bin/sh
# install.sh install|uninstall LINK: called by `make install` and `make uninstall`.
#
# What is installed is one link to the command in .venv. sudo resets PATH to the system's folders,
# so without it `sudo scope-ebpf` would not be found.
set -eu

action=$1
link=$2
command=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/scope-ebpf

fail() {
    echo "$*" >&2
    exit 1
}

is_ours() {
    [ -L "$link" ] && [ "$(readlink "$link")" = "$command" ]
}

is_absent() {
    [ ! -e "$link" ] && [ ! -L "$link" ]
}

case $action in
install)
    [ -x "$command" ] || fail "cannot install scope-ebpf: $command is not there; run make setup first"
    is_ours || is_absent ||
        fail "will not replace $link: make install did not put it there; remove it, or give another PREFIX"
    folder=$(dirname "$link")
    { mkdir -p "$folder" && [ -w "$folder" ]; } 2>/dev/null ||
        fail "cannot install into $folder: permission denied; run sudo make install, or give another PREFIX"
    ln -sfn "$command" "$link"
    echo "installed $link -> $command"
    ;;
uninstall)
    if is_absent; then
        echo "nothing to remove: $link is not there"
        exit 0
    fi
    is_ours || fail "will not remove $link: make install of this checkout did not put it there"
    [ -w "$(dirname "$link")" ] ||
        fail "cannot remove $link: permission denied; run sudo make uninstall"
    rm "$link"
    echo "removed $link"
    ;;
*)
    fail "install.sh takes install or uninstall, not '$action'"
    ;;
esac
