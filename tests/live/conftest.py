"""What the live tests share as fixtures."""

from __future__ import annotations

import pytest

from tests.live import recording


@pytest.fixture(params=["rings", "perf"])
def each_transport(request, monkeypatch):
    """The test runs once per transport; `attached` and `scope_ebpf_command` pass it on."""
    monkeypatch.setattr(recording, "TRANSPORT", ("--transport", request.param))
    return request.param
