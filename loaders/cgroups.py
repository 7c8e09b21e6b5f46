"""cgroups of the unified hierarchy: their ids, which are the inode numbers of their directories."""

import os
import re
from pathlib import Path

from scope_ebpf.errors import TargetError

MOUNTS = Path("/proc/self/mounts")
ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")


def _mounted(kind: bytes, mounts: Path) -> list[Path]:
    """Where file systems of a kind are mounted, in the order of the mounts."""
    found = []
    for line in mounts.read_bytes().split(b"\n"):
        fields = line.split(b" ")
        if len(fields) > 2 and fields[2] == kind:
            # the kernel writes white space and backslashes as three octal digits (seq_path)
            plain = ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), fields[1])
            found.append(Path(os.fsdecode(plain)))
    return found


def mount_point(mounts: Path = MOUNTS) -> Path | None:
    """Where the unified hierarchy (cgroup2) is mounted; None if it is not."""
    return next(iter(_mounted(b"cgroup2", mounts)), None)


def old_mount_points(mounts: Path = MOUNTS) -> list[Path]:
    """Where hierarchies of version 1 are mounted, of which there is one per controller."""
    return _mounted(b"cgroup", mounts)


def absence(mounts: Path = MOUNTS) -> tuple[str, str]:
    """Where no unified hierarchy is mounted: why, and how to get one."""
    if old_mount_points(mounts):
        # To mount one there would hide those that the host uses, and would show no cgroup but the root.
        return (
            "this host has cgroups of version 1 only",
            "boot it with systemd.unified_cgroup_hierarchy=1",
        )
    return "no unified hierarchy is mounted", "run `sudo mount -t cgroup2 none /sys/fs/cgroup`"


def resolve(name: str) -> Path:
    """The directory of a cgroup, given as its directory or as its path in the hierarchy.

    Raises:
        TargetError: there is no unified hierarchy, or no such cgroup in it.
    """
    root = mount_point()
    if root is None:
        fact, step = absence()
        raise TargetError(f"cannot record the cgroup {name}: {fact}; {step}, or use attach --pid")
    if not name:  # an empty variable of a shell, not the root with every process of the host
        raise TargetError("cannot record a cgroup without a name; / is the whole hierarchy")
    old = old_mount_points()
    for candidate in (Path(name), root / name.lstrip("/")):
        try:
            resolved = Path(os.path.realpath(candidate))
        except ValueError:  # no path at all: a zero byte in it
            continue
        # os.path: Path.is_dir() raises for a name that is too long or may not be looked at
        if not os.path.isdir(resolved):
            continue
        if resolved == root or root in resolved.parents:
            return resolved
        if any(mount == resolved or mount in resolved.parents for mount in old):
            raise TargetError(
                f"cannot record the cgroup {name}: it is of version 1, and only those of the unified"
                f" hierarchy below {root} can be; `grep ^0:: /proc/PID/cgroup` tells a process's there"
            )
    raise TargetError(
        f"cannot record the cgroup {name}: it is no directory below {root};"
        " `grep ^0:: /proc/PID/cgroup` tells the cgroup of a process"
    )


def descendants(directory: Path) -> dict[int, Path]:
    """The ids of a cgroup and of all below it, with their directories."""
    found: dict[int, Path] = {}
    for path, _, _ in os.walk(directory):
        try:
            found[os.stat(path).st_ino] = Path(path)
        except FileNotFoundError:
            continue  # removed meanwhile
    return found


class CgroupPaths:
    """Paths of cgroups by id: as the kernel told them when they were made, else looked up when needed."""

    KEPT = 1 << 16

    def __init__(self) -> None:
        """Know nothing yet."""
        self._root = mount_point()
        self._paths: dict[int, str | None] = {}

    def learn(self, identity: int, path: str) -> None:
        """A cgroup was made; it may be gone before anybody asks for it."""
        self._paths.pop(identity, None)
        self._paths[identity] = path
        while len(self._paths) > self.KEPT:
            del self._paths[next(iter(self._paths))]  # what is still there is found again

    def path(self, identity: int) -> str | None:
        """The cgroup's path below the root of the hierarchy; None if it is gone or not visible."""
        if identity not in self._paths and self._root is not None:
            for number, directory in descendants(self._root).items():
                self._paths[number] = "/" + "/".join(directory.relative_to(self._root).parts)
        return self._paths.setdefault(identity, None)
