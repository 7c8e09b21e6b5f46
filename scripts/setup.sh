#!/bin/bash
# setup.sh [--bench | --test | --lab]: called by `make setup`, which then builds the BPF objects.
#
# Installs the system packages that are missing, makes .venv, and installs the project into it.
# What is already there is found by looking for the thing itself, not for a package name, so a
# machine without apt can be prepared by hand. Run again, it only looks, which takes under a second.
# --bench adds the tools that `make bench` compares with, --test the servers that only tests talk to,
# --lab what the virtual machines of `make lab` need.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${LLVM_VERSIONS:?setup.sh gets the compilers to look for from the Makefile; run make setup}"
OLDEST_CLANG=14
# Not the python3 of PATH: only the system's own one sees the system's python3-bpfcc.
SYSTEM_PYTHON=/usr/bin/python3
STAMP=.venv/.setup-done

say() {
    printf '  %-8s %s\n' "$1" "$2" >&2
}

fail() {
    echo "setup: $*" >&2
    exit 1
}

as_owner() {
    scripts/as_owner.sh "$@"
}

# --- What must be there, each as a question about this machine -----------------------------------

has_command() {
    command -v "$1" >/dev/null
}

has_clang() {
    has_command "$1" && has_command "$2" || return 1
    local major
    major=$("$1" -dumpversion | cut -d. -f1)
    [ "$major" -ge "$OLDEST_CLANG" ]
}

has_libbpf() {
    # The dynamic linker's folders, as ldconfig sees them: sudo and cron have it outside their PATH.
    # No `| grep -q` under pipefail: it hangs up on a writer that is not done, which then has failed.
    [[ $(PATH=$PATH:/sbin:/usr/sbin ldconfig -p) == *libbpf.so.[01]\ * ]]
}

has_bcc() {
    # The bcc of PyPI is another project; the real one contains libbcc.
    "$SYSTEM_PYTHON" -c '
import importlib.util, pathlib, sys
found = importlib.util.find_spec("bcc")
folders = found.submodule_search_locations if found else ()
sys.exit(not any((pathlib.Path(f) / "libbcc.py").exists() for f in folders or ()))'
}

has_venv() {
    "$SYSTEM_PYTHON" -c 'import ensurepip, venv' 2>/dev/null
}

has_initdb() {
    # Debian keeps the server's programs out of PATH, one folder for each version.
    has_command initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

has_nginx() {
    # Debian's place for it, which only root has in PATH.
    has_command nginx || [ -x /usr/sbin/nginx ]
}

# --- What to install for what is missing ---------------------------------------------------------

# Each entry is a choice, of which the first that is available gets installed; + joins packages.
wanted=()
want() {
    wanted+=("$1")
}

look_for_everything() {
    wanted=()
    has_command "$SYSTEM_PYTHON" || want python3
    has_command make || want make
    if ! has_clang "${CLANG:-clang}" "${LLVM_STRIP:-llvm-strip}"; then
        local version pairs=''
        for version in $LLVM_VERSIONS; do
            pairs+=" clang-$version+llvm-$version"
        done
        want "$pairs"
    fi
    [ -e /usr/include/bpf/bpf_helpers.h ] || want libbpf-dev
    has_libbpf || want 'libbpf1 libbpf0'
    if has_command "$SYSTEM_PYTHON"; then
        has_venv || want python3-venv
        has_bcc || want python3-bpfcc
    else
        want python3-venv
        want python3-bpfcc
    fi
    # For the live tests and the benchmarks, whose workloads are in C.
    has_command gcc || want gcc+libc6-dev
    # For the demo and the live tests, which start their own private servers.
    has_initdb || want postgresql
    has_command redis-server || want redis-server
    has_nginx || want 'nginx-light nginx'
}

look_for_bench_tools() {
    wanted=()
    has_command bpftrace || want bpftrace
    has_command strace || want strace
    has_command perf || want 'linux-perf linux-tools-generic'
}

look_for_test_servers() {
    wanted=()
    has_command my_print_defaults && has_command mariadb-install-db ||
        want 'mariadb-server-core+mariadb-client-core mariadb-server'
    has_command openssl || want openssl
}

look_for_lab_tools() {
    wanted=()
    # The lab's kernels are Debian's for x86-64; elsewhere QEMU would emulate these as well.
    has_command qemu-system-x86_64 || want qemu-system-x86
    has_command debootstrap || [ -x /usr/sbin/debootstrap ] || want debootstrap
    has_command mke2fs || [ -x /sbin/mke2fs ] || want e2fsprogs
    # Ubuntu's debootstrap comes without the keys of Debian.
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || want debian-archive-keyring
    # Only `make check` asks for it, to read the Vagrantfile.
    has_command vagrant || ! is_available vagrant || want vagrant
}

is_available() {
    local package
    for package in ${1//+/ }; do
        # "Candidate: (none)" is what a name has that only other packages mention.
        [[ $(apt-cache policy "$package" 2>/dev/null) == *'Candidate: '[^\(]* ]] || return 1
    done
}

chosen=()
choose_packages() {
    local entry choice best packages
    chosen=()
    for entry in "${wanted[@]}"; do
        best=''
        for choice in $entry; do
            # When none is available, the first name still says what is missing.
            best=${best:-$choice}
            if is_available "$choice"; then
                best=$choice
                break
            fi
        done
        read -ra packages <<<"${best//+/ }"
        chosen+=("${packages[@]}")
    done
}

# apt starts the servers that it installs. We want their programs only: what was not on this machine
# before must not listen on it afterwards.
servers_to_stop=()
stop_servers() {
    local server
    for server in "${servers_to_stop[@]}"; do
        [ -e "/etc/init.d/$server" ] || continue
        say OFF "$server (installed for its programs, not to run as a service)"
        if [ -d /run/systemd/system ]; then
            systemctl disable --now --quiet "$server" || true
        else
            PATH=$PATH:/usr/sbin
            invoke-rc.d "$server" stop >/dev/null 2>&1 || true
            update-rc.d "$server" disable >/dev/null 2>&1 || true
        fi
    done
}

install_packages() {
    [ "${#wanted[@]}" -gt 0 ] || return 0
    choose_packages
    has_command apt-get ||
        fail "cannot install ${chosen[*]} (as Debian calls them): there is no apt-get here;" \
            "install these with this system's package manager, then run make setup again"
    if [ "$(id -u)" -ne 0 ]; then
        fail "cannot install ${chosen[*]}: not root;" \
            "run sudo apt-get install --no-install-recommends ${chosen[*]}, then make setup again"
    fi
    say APT 'update'
    apt-get update -qq || fail "cannot read the package lists: apt-get update failed (see above);" \
        "check the network and the sources of apt, then run make setup again"
    choose_packages
    local package
    for package in "${chosen[@]}"; do
        case $package in
        postgresql | redis-server) servers_to_stop+=("$package") ;;
        nginx*) servers_to_stop+=(nginx) ;;
        mariadb-server) servers_to_stop+=(mariadb) ;;
        esac
    done
    say APT "install ${chosen[*]}"
    # Also when apt fails half-way, or is interrupted.
    trap stop_servers EXIT
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        "${chosen[@]}" </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        rm "$log"
        fail "cannot install ${chosen[*]}: apt-get failed (see above);" \
            "correct what it names, then run make setup again"
    fi
    rm "$log"
    stop_servers
    trap - EXIT
}

# --- The Python side -----------------------------------------------------------------------------

# What .venv itself depends on: it holds its own path, and works with one Python only.
venv_identity() {
    echo "$PWD $("$SYSTEM_PYTHON" --version)"
}

make_venv() {
    local identity packages
    identity=$(venv_identity)
    packages=$(cat pyproject.toml scripts/setup.sh | sha256sum)
    if [ ! -x .venv/bin/python ] || [ "$(sed -n 1p $STAMP 2>/dev/null)" != "$identity" ]; then
        "$SYSTEM_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "cannot make .venv: $SYSTEM_PYTHON is $("$SYSTEM_PYTHON" --version)," \
                "and scope-ebpf needs 3.10 or newer; use a newer release of this system"
        say VENV .venv
        as_owner "$SYSTEM_PYTHON" -m venv --clear --system-site-packages .venv ||
            fail "cannot make .venv: see above; remove .venv, then run make setup again"
    elif [ "$(sed -n 2p $STAMP)" = "$packages" ]; then
        return 0
    fi
    say PIP "install -e .[dev,demo]"
    as_owner .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -e '.[dev,demo]' </dev/null ||
        fail "cannot install the Python packages: pip failed (see above);" \
            "check the network or pip's index, then run make setup again"
    printf '%s\n' "$identity" "$packages" | as_owner tee $STAMP >/dev/null
}

# An OTLP receiver that others wrote, for the tests of `export`. Its pins do not fit ours.
make_receiver() {
    local folder=build/otlp-receiver
    [ ! -x $folder/bin/ddapm-test-agent ] || return 0
    say VENV $folder
    as_owner mkdir -p build
    as_owner "$SYSTEM_PYTHON" -m venv --clear $folder
    say PIP "install ddapm-test-agent"
    as_owner $folder/bin/python -m pip install --quiet --disable-pip-version-check \
        'ddapm-test-agent>=1.20' </dev/null ||
        fail "cannot install ddapm-test-agent: pip failed (see above);" \
            "check the network or pip's index, then run make test again"
}

case ${1-} in
'')
    look_for_everything
    install_packages
    make_venv
    ;;
--bench)
    look_for_bench_tools
    install_packages
    ;;
--test)
    look_for_test_servers
    install_packages
    make_receiver
    # 77: no way to Debian's packages; the tests that need what is in it say so
    as_owner scripts/chroot.sh >/dev/null || [ $? -eq 77 ] ||
        fail "cannot make a chroot with newer Pythons: see above"
    ;;
--lab)
    look_for_lab_tools
    install_packages
    ;;
*)
    fail "unknown argument '$1'; there are --bench, --test and --lab"
    ;;
esac
