#!/bin/bash
# provision.sh [KERNEL]: makes a Debian bookworm into a guest of the lab. Run as root.
#
# Both paths run it: the Vagrantfile inside of a virtual machine, where KERNEL (5.10, 6.1, 6.12,
# newest) is the one to boot from then on, and image.sh inside of a chroot, without KERNEL.
# What it takes the Python requirements from is pyproject.toml in $LAB_SOURCE.
set -euo pipefail

SOURCE=${LAB_SOURCE:-/scope}
VENV=/opt/scope
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
MIRROR=${LAB_MIRROR:-http://deb.debian.org/debian}
SECURITY=${LAB_SECURITY:-http://deb.debian.org/debian-security}
LOG=/var/log/lab-provision.log
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

# What the guests run on, what they are traced with to compare, and what is recorded in them.
USERLAND=(
    systemd systemd-sysv dbus udev kmod procps psmisc util-linux iproute2 less ca-certificates
    python3 python3-venv libpython3.11 python3-bpfcc bpfcc-tools libbpf1 bpftrace strace
    gcc libc6-dev
    postgresql redis-server nginx-light cron openssl
)

# Name in the lab, and which package has its image. Debian's cloud kernels: NVMe and ext4 are built
# in, so they boot without an initrd.
KERNELS=(
    '5.10   ^linux-image-5\.10\.0-[0-9]+-cloud-amd64$'
    '6.1    ^linux-image-6\.1\.0-[0-9]+-cloud-amd64$'
    '6.12   ^linux-image-6\.12\.[0-9.]+\+deb12-cloud-amd64$'
    'newest ^linux-image-[0-9.]+\+deb13-cloud-amd64$'
)

say() {
    printf '  %-8s %s\n' "$1" "$2" >&2
}

fail() {
    echo "provision: $*" >&2
    exit 1
}

install_userland() {
    say APT "install ${#USERLAND[@]} packages and what they need"
    apt-get -qq update
    apt-get -qq -y --no-install-recommends install "${USERLAND[@]}" >/dev/null 2>"$LOG" || {
        cat "$LOG" >&2
        fail "cannot install the packages: apt-get failed (see above)"
    }
}

# The requirements of pyproject.toml, without what only checks the source. polars in its build for old
# processors: QEMU 7.2 without KVM emulates some AVX2 wrongly, and sums of groups came out wrong.
requirements() {
    /usr/bin/python3 - "$SOURCE/pyproject.toml" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
wanted.append("polars[rtcompat]")
print("\n".join(r for r in wanted if not r.startswith(("mypy", "ruff", "types-"))))
PYTHON
}

# The tree itself is not installed: /scope is put on the path, whatever is there later.
make_venv() {
    say VENV $VENV
    # The system's own Python, and its packages: BCC is one of these.
    /usr/bin/python3 -m venv --system-site-packages $VENV
    requirements >$VENV/requirements.txt
    say PIP "install $(wc -l <$VENV/requirements.txt) requirements"
    $VENV/bin/python -m pip install --quiet --disable-pip-version-check -r $VENV/requirements.txt
    echo /scope >"$($VENV/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/scope.pth"
    cat >$VENV/bin/scope-ebpf <<PYTHON
#!$VENV/bin/python
import sys

from scope_ebpf.cli.main import main

sys.exit(main())
PYTHON
    chmod 755 $VENV/bin/scope-ebpf
    ln -sf $VENV/bin/scope-ebpf /usr/local/bin/scope-ebpf
}

# Images and headers are unpacked, not installed: those of trixie would want its compiler and libc,
# and a package would make an initrd for each. apt reads their suites with a state of its own.
install_kernels() {
    local work suite entry name pattern release found parts
    work=$(mktemp -d)
    mkdir -p "$work"/{lists,cache/archives}/partial
    : >"$work/status"
    for suite in bullseye bookworm trixie-backports; do
        echo "deb [signed-by=$KEYRING] $MIRROR $suite main"
    done >"$work/sources.list"
    for suite in bullseye-security bookworm-security; do
        echo "deb [signed-by=$KEYRING] $SECURITY $suite main"
    done >>"$work/sources.list"
    local options=(-qq -o "Dir::State=$work" -o "Dir::State::status=$work/status"
        -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Acquire::Languages=none -o APT::Sandbox::User=root)
    say APT 'update, with the suites that have the kernels'
    apt-get "${options[@]}" update

    rm -f /boot/lab-kernels
    for entry in "${KERNELS[@]}"; do
        read -r name pattern <<<"$entry"
        found=$(apt-cache "${options[@]}" search --names-only "$pattern" | cut -d' ' -f1 | sort -V | tail -n 1)
        [ -n "$found" ] || fail "no package of the kernel $name is at $MIRROR ($pattern)"
        release=${found#linux-image-}
        say KERNEL "$name is $release"
        # From Linux 7 on an image has the kernel and its modules in packages that it depends on.
        parts=$(apt-cache "${options[@]}" show "linux-image-$release" "linux-headers-$release" |
            sed -n 's/^Depends: //p' | grep -oE "linux-(base|binary|modules)-${release//+/\\+}" | sort -u || true)
        # shellcheck disable=SC2086  # several
        fetch "linux-image-$release" "linux-headers-$release" \
            "linux-headers-${release/cloud-amd64/common}" $parts
        # Since then it also has another place.
        [ -e "/boot/vmlinuz-$release" ] ||
            mv "/usr/lib/modules/$release/vmlinuz" "/boot/vmlinuz-$release" || fail "linux-image-$release came without a kernel"
        depmod "$release"
        echo "$name $release" >>/boot/lab-kernels
    done
    rm -rf "$work"
}

# Unpacks packages over this system; $options comes from the caller.
fetch() {
    local cache=/var/cache/apt/archives/lab root name folder
    mkdir -p $cache /boot /usr/lib/modules /usr/src
    root=$(mktemp -d)
    # What was loaded before is found there again.
    (cd $cache && apt-get "${options[@]}" download "$@")
    # A line is: 'URI' file size hash
    while read -r _ name _; do
        dpkg --extract "$cache/$name" "$root"
    done < <(apt-get "${options[@]}" --print-uris download "$@")
    # By hand, because /lib is a link here and a folder in there.
    for folder in boot usr/src lib/modules usr/lib/modules; do
        [ -d "$root/$folder" ] || continue
        cp -a "$root/$folder/." "/${folder/#lib/usr/lib}/"
    done
    rm -rf "$root"
}

# Only in a virtual machine that boots by itself.
boot_next() {
    local release
    release=$(awk -v name="$1" '$1 == name { print $2 }' /boot/lab-kernels)
    [ -n "$release" ] ||
        fail "no kernel '$1' in the lab; there are $(cut -d' ' -f1 /boot/lab-kernels | paste -sd' ')"
    say BOOT "$release, from the next start on"
    mkdir -p /etc/default/grub.d
    update-initramfs -c -k "$release" >/dev/null
    # Every kernel in the first menu: an entry of a submenu has a longer name.
    cat >/etc/default/grub.d/lab.cfg <<'GRUB'
GRUB_DEFAULT=saved
GRUB_DISABLE_SUBMENU=y
GRUB
    update-grub >/dev/null 2>&1
    local entry
    entry=$(grep -o "gnulinux-$release-advanced-[^']*" /boot/grub/grub.cfg | head -n 1)
    [ -n "$entry" ] || fail "GRUB's menu has no Linux $release: see /boot/grub/grub.cfg"
    grub-set-default "$entry"
}

[ "$(id -u)" -eq 0 ] || fail "cannot install packages: not root; run it with sudo"
install_userland
make_venv
if [ ! -e /boot/lab-kernels ]; then install_kernels; fi
if [ -n "${1-}" ]; then boot_next "$1"; fi
