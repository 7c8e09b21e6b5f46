"""Where processes run, by the paths of their cgroups, as container managers and systemd make them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf.analysis.places import Place, place_of

pytestmark = pytest.mark.pure
ID = "4f1c2d3e5a6b" + "07" * 26
OTHER = "a" * 64
POD = "1b2c3d4e-0000-4000-8000-00000000000f"
POD_UNIT = POD.replace("-", "_")
SHORT = ID[:12]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, Place()),
        ("/", Place()),
        ("/init.scope", Place()),
        ("/user.slice/user-1000.slice/session-2.scope", Place()),
        ("/system.slice/nginx.service", Place("nginx")),
        ("/system.slice/system-postgresql.slice/postgresql@15-main.service", Place("postgresql")),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service", Place("shop")),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", Place()),
        # Docker
        (f"/docker/{ID}", Place(None, SHORT, "docker")),
        (f"/system.slice/docker-{ID}.scope", Place(None, SHORT, "docker")),
        (f"/system.slice/docker-{ID}.scope/init", Place(None, SHORT, "docker")),
        (f"/docker/{ID}/docker/{OTHER}", Place(None, "a" * 12, "docker")),
        ("/system.slice/docker.service", Place("docker")),
        # Podman, as root and as a user; the monitor is not in the container
        (f"/machine.slice/libpod-{ID}.scope/container", Place(None, SHORT, "podman")),
        (
            f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope",
            Place(None, SHORT, "podman"),
        ),
        (f"/libpod_parent/libpod-{ID}", Place(None, SHORT, "podman")),
        (f"/machine.slice/libpod-conmon-{ID}.scope", Place()),
        # Kubernetes, with both drivers of containerd, and CRI-O
        (
            f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_UNIT}.slice"
            f"/cri-containerd-{ID}.scope",
            Place(None, SHORT, "containerd", "1b2c3d4e"),
        ),
        (f"/kubepods/besteffort/pod{POD}/{ID}", Place(None, SHORT, "kubernetes", "1b2c3d4e")),
        (
            f"/kubepods.slice/kubepods-pod{POD_UNIT}.slice/crio-{ID}.scope/container",
            Place(None, SHORT, "cri-o", "1b2c3d4e"),
        ),
        (
            f"/system.slice/containerd.service/kubepods-besteffort-pod{POD_UNIT}.slice"
            f":cri-containerd:{ID}",
            Place(None, SHORT, "containerd"),
        ),
        (f"/kubepods.slice/kubepods-pod{POD_UNIT}.slice/crio-conmon-{ID}.scope",
         Place(None, None, None, "1b2c3d4e")),
        # containerd by itself
        (f"/default/{ID}", Place(None, SHORT)),
        (f"/system.slice/nerdctl-{ID}.scope", Place(None, SHORT, "containerd")),
        (f"/ecs/task/{ID}", Place(None, SHORT)),
        # LXC, LXD
        ("/lxc/web", Place(None, "web", "lxc")),
        ("/lxc/web/system.slice/nginx.service", Place("nginx", "web", "lxc")),
        ("/lxc.payload.web-1", Place(None, "web-1", "lxc")),
        ("/lxc.payload/web/init.scope", Place(None, "web", "lxc")),
        ("/lxc.monitor.web", Place()),
        ("/lxc.monitor/web", Place()),
        # systemd-nspawn
        (
            "/machine.slice/systemd-nspawn@deb\\x2d12.service/payload/system.slice/cron.service",
            Place("cron", "deb-12", "nspawn"),
        ),
        ("/machine.slice/machine-deb.scope", Place(None, "deb", "machine")),
        # names that only look like it
        ("/docker", Place()),
        ("/docker/4f1c2d3e5a6b", Place()),
        ("/system.slice/docker-compose.service", Place("docker-compose")),
        ("/system.slice/podman.service", Place("podman")),
        (f"/system.slice/app-{ID[:63]}.scope", Place()),
    ],
)  # fmt: skip
def test_paths(path, expected):
    assert place_of(path) == expected


def test_in_words():
    path = f"/kubepods/besteffort/pod{POD}/{ID}/system.slice/nginx.service"
    assert str(place_of(path)) == f"pod 1b2c3d4e, kubernetes {SHORT}, nginx.service"
    assert str(place_of("/")) == ""


@given(st.text(max_size=200))
def test_any_path(path):
    """Paths of cgroups are chosen by users; none of them breaks the naming."""
    place = place_of(path)
    assert (place.container is not None) >= (place.runtime is not None)
    str(place)
