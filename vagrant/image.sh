#!/bin/bash
# image.sh FOLDER: makes the lab's disk and its kernels in FOLDER, which must not exist. Run as root.
#
# lab.py calls it, when what the image is made of has changed. Packages are kept in build/lab, so a
# second image takes a minute. No loop device and no mount that outlasts this script: what is mounted
# is so in a namespace of its own, and mke2fs copies the files into the image.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=bookworm
SPARE_MIB=2048
# Where the kernel finds its root: the signature of the disk, and the number of the partition.
DISK_ID=5c09eb9f

say() {
    printf '  %-8s %s\n' "$1" "$2" >&2
}

fail() {
    echo "image: $*" >&2
    exit 1
}

if [ "${LAB_UNSHARED-}" != yes ]; then
    [ "$(id -u)" -eq 0 ] || fail "cannot make a root file system: not root; run sudo make lab-image"
    LAB_UNSHARED=yes exec unshare --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi

folder=$1
mkdir -p build/lab/{debs,pip}
kept=$(realpath build/lab)
work=$(mktemp -d "$kept/.making.XXXXXX")
root=$work/root
finish() {
    # Nothing of the host may be below what is removed now.
    while read -r point; do umount "$point"; done < <(awk -v w="$work/" 'index($2, w) == 1 { print $2 }' /proc/mounts | tac)
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The mirrors that this system uses itself, as far as they are known to have what is needed.
repository() {
    apt-get indextargets --format '$(REPO_URI) $(ORIGIN) $(LABEL)' 'Created-By: Packages' 2>/dev/null |
        awk -v label="$1" '$2 == "Debian" && $3 == label && !seen++ { sub("/$", "", $1); print $1 }'
}
mirror=$(repository Debian)
mirror=${mirror:-http://deb.debian.org/debian}
security=$(repository Debian-Security)
security=${security:-http://deb.debian.org/debian-security}

say BOOT "$SUITE from $mirror"
log=$work/log
debootstrap --variant=minbase --include=ca-certificates --cache-dir="$kept/debs" \
    $SUITE "$root" "$mirror" >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    fail "debootstrap failed (see above); check the network and $mirror"
}

cat >"$root/etc/apt/sources.list" <<SOURCES
deb $mirror $SUITE main
deb $mirror $SUITE-updates main
deb $security $SUITE-security main
SOURCES
# Nothing reads manuals here, and a crash during the build throws everything away.
cat >"$root/etc/dpkg/dpkg.cfg.d/lab" <<'DPKG'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
DPKG
echo 'Binary::apt-get::APT::Keep-Downloaded-Packages "true";' >"$root/etc/apt/apt.conf.d/lab"
rm -f "$root/etc/apt/apt.conf.d/docker-clean"
# What is installed is not started.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"

mkdir -p "$root/lab/source" "$root/root/.cache/pip"
cp pyproject.toml "$root/lab/source/"
cp vagrant/provision.sh "$root/lab/"
cp /etc/ssl/certs/ca-certificates.crt "$root/lab/ca.crt"
cp --remove-destination -L /etc/resolv.conf /etc/hosts "$root/etc/"
mount --bind "$kept/debs" "$root/var/cache/apt/archives"
mount --bind "$kept/pip" "$root/root/.cache/pip"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"

# pip is as this machine's own: its index, its proxies, whom it trusts.
index=$(pip config get global.index-url 2>/dev/null || true)
env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LAB_SOURCE=/lab/source \
    LAB_MIRROR="$mirror" LAB_SECURITY="$security" PIP_CERT=/lab/ca.crt \
    PIP_INDEX_URL="${PIP_INDEX_URL:-${index:-https://pypi.org/simple}}" PIP_ROOT_USER_ACTION=ignore \
    PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}" \
    ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
    chroot "$root" /lab/provision.sh || fail "cannot provision it: see above"

umount "$root/dev" "$root/proc" "$root/root/.cache/pip" "$root/var/cache/apt/archives"
rm -rf "$root/lab" "$root/usr/sbin/policy-rc.d" "$root"/var/lib/apt/lists/* "$root"/root/.cache
rm -f "$root/etc/resolv.conf"
printf '127.0.0.1 localhost lab\n::1 localhost\n' >"$root/etc/hosts"
echo lab >"$root/etc/hostname"
: >"$root/etc/machine-id"
printf '/dev/root / ext4 defaults 0 0\n' >"$root/etc/fstab"
install -D -m 755 -t "$root/usr/lib/lab" vagrant/guest/start
install -D -m 644 -t "$root/etc/systemd/system" vagrant/guest/lab-job.service
ln -s ../lab-job.service "$root/etc/systemd/system/multi-user.target.wants/"
mkdir -p "$root/scope" "$root/results"

say IMAGE "$folder"
mkdir "$work/out"
while read -r _ release; do
    mv "$root/boot/vmlinuz-$release" "$work/out/"
done <"$root/boot/lab-kernels"
cp "$root/boot/lab-kernels" "$work/out/kernels"
chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' >"$work/out/packages"
image=$work/out/root.img
size_mib=$(($(du -sm "$root" | cut -f1) + SPARE_MIB))
truncate -s "$((size_mib + 1))M" "$image"
# A partition table, for the kernel to find its root by: one partition of Linux, from 1 MiB on.
python3 - "$image" $DISK_ID $((size_mib << 11)) <<'PYTHON'
import struct, sys

path, disk_id, sectors = sys.argv[1], int(sys.argv[2], 16), int(sys.argv[3])
entry = struct.pack("<BxxxBxxxII", 0, 0x83, 2048, sectors)
with open(path, "r+b") as image:
    image.seek(440)
    image.write(struct.pack("<IH", disk_id, 0) + entry)
    image.seek(510)
    image.write(b"\x55\xaa")
PYTHON
# No journal: nothing of this disk outlasts the guest.
mke2fs -q -F -t ext4 -O ^has_journal -E "offset=1048576,root_owner=0:0" -d "$root" "$image" "${size_mib}M"
chmod -R u=rwX,go=rX "$work/out"
mv "$work/out" "$folder"
