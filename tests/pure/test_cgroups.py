"""cgroups: the mount as /proc/self/mounts tells it, names that users give, and paths by id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scope_ebpf.errors import TargetError
from scope_ebpf.loaders import cgroups
from scope_ebpf.loaders.cgroups import (
    CgroupPaths,
    absence,
    descendants,
    mount_point,
    old_mount_points,
    resolve,
)

pytestmark = pytest.mark.pure


def mounts(folder: Path, *lines: bytes) -> Path:
    file = folder / "mounts"
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def escaped(path: bytes) -> bytes:
    """As the kernel writes a mount point: these are escaped (fs/proc_namespace.c)."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path)


@pytest.fixture
def hierarchy(tmp_path, monkeypatch):
    """A tree that stands for the unified hierarchy: /a/b/.c and /system.slice."""
    root = tmp_path / "the hierarchy"
    (root / "a" / "b" / ".c").mkdir(parents=True)
    (root / "system.slice").mkdir()
    (root / "a" / "cgroup.procs").write_text("")
    (tmp_path / "outside").mkdir()
    line = b"none " + escaped(os.fsencode(root)) + b" cgroup2 rw 0 0"
    monkeypatch.setattr(
        cgroups,
        "mount_point",
        lambda: mount_point(mounts(tmp_path, b"proc /proc proc rw 0 0", line)),
    )
    monkeypatch.chdir(tmp_path)
    return root


def test_the_mount(tmp_path):
    version1 = b"cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0"
    version2 = b"cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0"
    assert mount_point(mounts(tmp_path)) is None
    assert mount_point(mounts(tmp_path, version1)) is None
    assert mount_point(mounts(tmp_path, version1, version2)) == Path("/sys/fs/cgroup/unified")
    # a mount that is called so, and is not
    assert mount_point(mounts(tmp_path, b"cgroup2 /cgroup2 tmpfs rw 0 0")) is None


@given(st.binary(min_size=1, max_size=40).filter(lambda data: b"\0" not in data))
@example("é ü".encode())
@example(b"\\x41\\134\\040")
@example(b"\x85\xa0\x1c")  # white space to str.split(), not to the kernel
@example(b"\xff")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mount_point(tmp_path, name):
    path = b"/" + name
    file = mounts(tmp_path, b"none " + escaped(path) + b" cgroup2 rw 0 0")
    assert mount_point(file) == Path(os.fsdecode(path))


@given(
    st.binary(max_size=100)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
)
@example(b"a \\ cgroup2")
@example(b"a \\x cgroup2")
@example(b"a \\u12 cgroup2")
@example(b"a \\N{x} cgroup2")
@example(b"a \\777 cgroup2")
@example(b" cgroup2 cgroup2")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mounts(tmp_path, text):
    found = mount_point(mounts(tmp_path, text))
    assert found is None or b"cgroup2" in text


def test_resolve(hierarchy):
    for name in ("a/b", "/a/b", "/a/../a/b/", str(hierarchy / "a/b"), "the hierarchy/a/b"):
        assert resolve(name) == hierarchy / "a" / "b"
    for name in ("/", str(hierarchy)):
        assert resolve(name) == hierarchy


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "outside",
        "/outside",
        "/a/cgroup.procs",
        "a/none",
        "../outside",
        "x" * 5000,
        "/a\0b",
    ],
)
def test_resolve_nothing_else(hierarchy, name):
    """Least of all the root for an empty name: that would record the whole host."""
    with pytest.raises(TargetError, match="cannot record") as caught:
        resolve(name)
    assert ";" in str(caught.value)


def test_resolve_follows_no_link_out(hierarchy):
    (hierarchy / "link").symlink_to(hierarchy.parent / "outside")
    (hierarchy / "round").symlink_to(hierarchy / "round")
    for name in ("link", "round"):
        with pytest.raises(TargetError, match="it is no directory below"):
            resolve(name)


@given(name=st.text(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resolve_anything(hierarchy, name):
    try:
        found = resolve(name)
    except TargetError:
        return
    assert found == hierarchy or hierarchy in found.parents


def test_no_hierarchy(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "mount_point", lambda: None)
    monkeypatch.setattr(cgroups, "absence", lambda: absence(mounts(tmp_path)))
    with pytest.raises(TargetError, match="no unified hierarchy is mounted; run `sudo mount"):
        resolve("/a")
    assert CgroupPaths().path(7) is None


def test_version_1_only(tmp_path, monkeypatch):
    """Nothing is mounted over what such a host uses."""
    file = mounts(tmp_path, b"cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0")
    assert old_mount_points(file) == [Path("/sys/fs/cgroup/cpu")]
    monkeypatch.setattr(cgroups, "mount_point", lambda: None)
    monkeypatch.setattr(cgroups, "absence", lambda: absence(file))
    with pytest.raises(TargetError, match="of version 1 only; boot it with") as caught:
        resolve("/a")
    assert "sudo mount" not in str(caught.value)


def test_a_cgroup_of_version_1_beside_the_hierarchy(hierarchy, tmp_path, monkeypatch):
    old = tmp_path / "outside"
    (old / "service").mkdir()
    monkeypatch.setattr(cgroups, "old_mount_points", lambda: [old])
    for path in (old, old / "service"):
        with pytest.raises(TargetError, match="it is of version 1, and only those of the unified"):
            resolve(str(path))
    # the name of one there is a path in the unified hierarchy
    assert resolve("/a/b") == hierarchy / "a" / "b"


def test_descendants_and_their_paths(hierarchy):
    ids = {path: number for number, path in descendants(hierarchy).items()}
    below = {"", "a", "a/b", "a/b/.c", "system.slice"}
    assert ids.keys() == {hierarchy / name for name in below}
    paths = CgroupPaths()
    for name in below:
        assert paths.path(ids[hierarchy / name]) == f"/{name}"
    (hierarchy / "..hidden").mkdir()  # one that came later; nothing of its name is cut off
    assert paths.path((hierarchy / "..hidden").stat().st_ino) == "/..hidden"
    assert paths.path(max(ids.values()) + 1000) is None


def test_a_path_stays_known(hierarchy):
    """Rows of a process may come after its cgroup is gone."""
    paths = CgroupPaths()
    number = (hierarchy / "system.slice").stat().st_ino
    assert paths.path(number) == "/system.slice"
    (hierarchy / "system.slice").rmdir()
    assert paths.path(number) == "/system.slice"
    assert number not in descendants(hierarchy)
