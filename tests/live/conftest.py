"""What the live tests share as fixtures."""

from __future__ import annotations

import signal

import pytest

from tests.live import recording


@pytest.fixture(scope="session", autouse=True)
def hangups_end_programs():
    """Also where the tests were started with nohup, whose children would go on ignoring SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(params=["rings", "perf"])
def each_transport(request, monkeypatch):
    """The test runs once per transport; `attached` and `scope_ebpf_command` pass it on."""
    monkeypatch.setattr(recording, "TRANSPORT", ("--transport", request.param))
    return request.param
