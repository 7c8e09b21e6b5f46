#!/bin/sh
# install_service.sh install|uninstall COMMAND FOLDER: called by `make install-service` and its opposite.
#
# Puts scope-ebpf.service, which runs COMMAND, into FOLDER. Nothing is started: that is said, not done.
set -eu

action=$1
command=$2
unit=$3/scope-ebpf.service
source=$(dirname "$0")/scope-ebpf.service

fail() {
    echo "$*" >&2
    exit 1
}

# Whether this kernel is of that version or a later one.
is_since() {
    [ "$(printf '%s\n' "$1" "$(uname -r)" | sort -V | head -n 1)" = "$1" ]
}

case $action in
install)
    mkdir -p "$3" 2>/dev/null && [ -w "$3" ] ||
        fail "cannot install into $3: permission denied; run sudo make install-service"
    sed "s|^ExecStart=[^ ]*|ExecStart=$command|" "$source" >"$unit.part"
    mv "$unit.part" "$unit"
    echo "installed $unit; start it with: systemctl daemon-reload && systemctl enable --now scope-ebpf"
    # README.md, "Privileges": uprobes before 6.6, and from 7.0 on the programs at system calls
    if [ "$(cat /proc/sys/kernel/perf_event_paranoid 2>/dev/null || echo 0)" -gt 2 ] &&
        { ! is_since 6.6 || is_since 7.0; }; then
        echo "before, run: sysctl kernel.perf_event_paranoid=2; without root this kernel refuses perf events else"
    fi
    ;;
uninstall)
    if [ ! -e "$unit" ]; then
        echo "nothing to remove: $unit is not there"
        exit 0
    fi
    [ -w "$3" ] || fail "cannot remove $unit: permission denied; run sudo make uninstall-service"
    rm "$unit"
    echo "removed $unit; its recordings stay in /var/lib/scope-ebpf"
    ;;
*)
    fail "install_service.sh takes install or uninstall, not '$action'"
    ;;
esac
