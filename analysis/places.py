"""Where a process runs, by the path of its cgroup: which systemd unit, in which container of what.

A path tells that because container managers and systemd name cgroups after what is in them:

- Docker: `/docker/ID`, with the systemd driver `docker-ID.scope` (moby, daemon/oci_linux.go)
- Podman: `libpod-ID.scope`, also below a user's manager; `libpod-conmon-ID` is the container's monitor,
  which runs outside of it (libpod/oci_conmon_common.go)
- Kubernetes: `kubepods…/pod…/ID` or `…-podUID.slice/cri-containerd-ID.scope`, `crio-ID.scope`
  (pkg/kubelet/cm/cgroup_manager_linux.go)
- containerd by itself (nerdctl): `/NAMESPACE/ID`, `nerdctl-ID.scope`; ids of other lengths than 64 digits
  cannot be told from other names
- LXC and LXD: `/lxc/NAME`, `/lxc.payload.NAME` (src/lxc/cgroups/cgfsng.c); `lxc.monitor.NAME` is the monitor
- systemd-nspawn: `systemd-nspawn@NAME.service`, `machine-NAME.scope`
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

SHORT_ID: Final = 12  # digits of a container's id, as `docker ps` shows them

_ID: Final = r"(?P<id>[0-9a-f]{64})(?:\.scope)?"
_NAME: Final = r"(?P<name>[^/]+?)"
# One component of a path each, the most telling first. What stands before an id names the runtime.
_CONTAINERS: Final = tuple(
    (re.compile(pattern), runtime)
    for pattern, runtime in (
        (rf"docker-{_ID}", "docker"),
        (rf"libpod-{_ID}", "podman"),
        (rf"nerdctl-{_ID}", "containerd"),
        (rf"crio-{_ID}", "cri-o"),
        (rf"cri-containerd-{_ID}", "containerd"),
        # containerd's systemd driver where the kubelet's is cgroupfs: SLICE:PREFIX:ID
        (rf"[^/]*:cri-containerd:{_ID}", "containerd"),
        (rf"(?:[a-z-]+-)?{_ID}", None),
        (rf"lxc\.payload\.{_NAME}", "lxc"),
        (rf"systemd-nspawn@{_NAME}\.service", "nspawn"),
        (rf"machine-{_NAME}\.scope", "machine"),
    )
)
# A container's monitor has its id in its name, and is not in it.
_MONITOR: Final = re.compile(r"(?:libpod|crio)-conmon-[0-9a-f]{64}(?:\.scope)?|lxc\.monitor[./].*")
# Folders whose members are containers, of which they tell the runtime.
_PARENTS: Final = {
    "docker": "docker",
    "libpod_parent": "podman",
    "lxc": "lxc",
    "lxc.payload": "lxc",
    "ecs": "ecs",
}
_POD: Final = re.compile(r"(?:.*-)?pod([0-9a-f]{8})[0-9a-f]{0,4}[-_].*|pod([0-9a-f]{32})")
# A process's own unit; user@1000.service is the manager of all that a user runs.
_UNIT: Final = re.compile(r"(?!user@)([^/]+)\.service")
_ESCAPE: Final = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True)
class Place:
    """What the path of a cgroup tells; None: not in one.

    Attributes:
        unit: the systemd unit, without the instance of a template; in a container that of its systemd.
        container: the beginning of the container's id, or its name where it has no id.
        runtime: docker, podman, containerd, cri-o, kubernetes, lxc, …; None: not known.
        pod: the beginning of the uid of the Kubernetes pod.
    """

    unit: str | None = None
    container: str | None = None
    runtime: str | None = None
    pod: str | None = None

    def __str__(self) -> str:
        """In a few words; empty: it is in none.

        >>> str(place_of("/system.slice/docker-" + "4f1c2d3e5a6b" + 52 * "0" + ".scope"))
        'docker 4f1c2d3e5a6b'
        """
        found = []
        if self.pod:
            found.append(f"pod {self.pod}")
        if self.container:
            found.append(f"{self.runtime or 'container'} {self.container}")
        if self.unit:
            found.append(f"{self.unit}.service")
        return ", ".join(found)


@lru_cache(maxsize=1 << 14)
def place_of(cgroup: str | None) -> Place:
    """The unit and the container of a cgroup, by its path in the unified hierarchy.

    Of containers in containers the innermost one counts. A unit outside of the container, such as that of
    a daemon that started it, is not the unit of what runs in it.

    >>> place_of("/system.slice/my\\\\x2dshop.service/workers").unit
    'my-shop'
    >>> place_of("/lxc.payload.web/system.slice/nginx.service")
    Place(unit='nginx', container='web', runtime='lxc', pod=None)
    """
    container = runtime = pod = unit = None
    before = ""
    for part in (cgroup or "").split("/"):
        if _MONITOR.fullmatch(part) or before == "lxc.monitor":
            break
        if found := _container(part, before):
            (container, runtime), unit = found, None
        elif named := _UNIT.fullmatch(part):
            unit = unescaped(named[1].partition("@")[0])
        elif match := _POD.fullmatch(part.removesuffix(".slice")):
            pod = match[1] or match[2][:8]
        before = part
    if container is not None and runtime is None and pod is not None:
        runtime = "kubernetes"
    return Place(unit, container, runtime, pod)


def _container(part: str, before: str) -> tuple[str, str | None] | None:
    """The container that a component of a path stands for, and its runtime."""
    for pattern, runtime in _CONTAINERS:
        if match := pattern.fullmatch(part):
            found = match.groupdict()
            if identity := found.get("id"):
                return identity[:SHORT_ID], runtime or _PARENTS.get(before)
            return unescaped(found["name"]), runtime
    # a folder of containers that have names
    if part and _PARENTS.get(before) == "lxc":
        return part, "lxc"
    return None


def unescaped(name: str) -> str:
    r"""The name of a unit as its owner wrote it (systemd-escape).

    >>> unescaped(r"my\x2dshop")
    'my-shop'
    """
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), name)
