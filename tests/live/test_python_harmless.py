"""Being recorded changes nothing in a Python process, however often and however a recorder ends."""

from __future__ import annotations

import signal
import subprocess
from contextlib import ExitStack

import pytest

from tests.live.contexts import KINDS, serving, serving_kind
from tests.live.harm import attach_often, code_of, interrupt, load, private_python
from tests.live.pythons import pythons
from tests.live.recording import PROGRAMS, Target, attached
from tests.live.roots import clear, running

pytestmark = pytest.mark.live

# Those that take seconds and depend on no network.
MODULES = ("test.test_asyncio.test_futures",)
LEAST_TESTS = 100
ATTACHES = 20
ENDS = 2
KILLS = 5
KIND = next(kind for kind in KINDS if kind.name == "uvloop-streams-pool")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "work"
    place.mkdir()
    return place


@pytest.fixture
def copy(tmp_path):
    """Where the server's interpreter is, which nobody else runs."""
    place = tmp_path / "python"
    place.mkdir()
    return place


@pytest.fixture
def server(copy):
    """A server under load, whose code is as before at the end."""
    python, environment = private_python(copy)
    with (
        serving("contexts_backend") as backend,
        serving_kind(KIND, backend, python, environment) as running_server,
    ):
        running_server.ask(10, 2)
        before = code_of(running_server.pid, copy)
        assert before
        with load(running_server):
            yield running_server
        assert code_of(running_server.pid, copy) == before
        assert running_server.target.process.poll() is None


def test_a_probe_is_seen_in_the_code(server, folder, copy):
    """That the other tests compare code is worth something only if they can see a difference."""
    before = code_of(server.pid, copy)
    with attached(folder, server.target) as session:
        assert code_of(server.pid, copy) != before
        session.stop()


def test_attaching_and_detaching_again_and_again_under_load(server):
    attach_often([server.pid], ATTACHES)


def test_recorders_ended_by_a_signal(server, folder):
    interrupt(folder, [server.pid], ENDS, signal.SIGTERM)


def test_recorders_killed_at_any_moment(server, folder):
    interrupt(folder, [server.pid], KILLS, signal.SIGKILL)


def test_the_tests_of_cpython_succeed_while_recorded(tmp_path):
    """All interpreters that have them, at the same time."""
    with ExitStack() as stack:
        targets = {}
        for python in pythons():
            stack.callback(clear, python)
            command = running(python, PROGRAMS / "harmless_suite.py", *MODULES)
            target = stack.enter_context(Target(*command, stderr=subprocess.DEVNULL))
            if target.process.poll() is None and has_tests(target):
                targets[str(python)] = target
        if not targets:
            pytest.skip("optional: no interpreter here has the tests of CPython")
        with attached(tmp_path, list(targets.values())) as session:
            for target in targets.values():
                target.open_gate()
            told = {name: target.note() for name, target in targets.items()}
            session.stop()
    assert session.recording.rows("samples") > 0
    for name, result in told.items():
        assert result["ran"] > LEAST_TESTS and not result["failed"], (name, result)


def has_tests(target: Target) -> bool:
    """Whether it waits at its gate; one without the tests ends."""
    try:
        target.process.wait(0.2)
    except subprocess.TimeoutExpired:
        return True
    return False
