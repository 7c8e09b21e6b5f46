"""What all tests share: live tests run wherever BPF works, and a skip there is a failure."""

import os
from collections.abc import Generator

import pytest

# How the reason of a skip begins that is right even there: a compiler for another architecture is missing,
# or a race could not be brought about.
OPTIONAL = "optional: "

# Set by `make test` and CI: a live test that is skipped then counts as failed.
REQUIRE_LIVE = bool(os.environ.get("SCOPE_EBPF_REQUIRE_LIVE"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Live tests need the kernel's consent: without root they are skipped, and say so."""
    if os.geteuid() == 0 or REQUIRE_LIVE:
        return
    for item in items:
        if item.get_closest_marker("live"):
            item.add_marker(pytest.mark.skip(reason="live tests need root: run `sudo make test`"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a live test into a failure where live tests are required."""
    report = yield
    allowed = OPTIONAL in str(report.longrepr)
    if REQUIRE_LIVE and report.skipped and not allowed and item.get_closest_marker("live"):
        report.outcome = "failed"
        report.longrepr = f"a live test was skipped where it must run: {report.longrepr}"
    return report
