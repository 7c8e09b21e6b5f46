"""What the tests of the lab share: they run in a guest only, where a skip without a reason is a failure.

`vagrant/lab.py` sets the environment by which a test knows where it is, and brings back what tests
write into `results`. `make lab-all` prints what `row` was told as rows of its table.
"""

import json
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.conftest import OPTIONAL

# The version of the guest's kernel, as 6.1; empty outside of the lab.
KERNEL = os.environ.get("SCOPE_EBPF_LAB", "")
SYSTEMD = os.environ.get("SCOPE_EBPF_LAB_INIT") == "systemd"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside of a guest they are skipped; so are those for systemd in a guest without it."""
    for item in items:
        if item.get_closest_marker("lab") is None:
            continue
        if not KERNEL:
            reason = "runs in a guest of the lab: make lab KERNEL=6.1"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("systemd") and not SYSTEMD:
            reason = OPTIONAL + "needs a guest with systemd: make lab KERNEL=6.1 SYSTEMD=1"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In a guest everything is there: what is skipped has to say that it is optional."""
    report = yield
    expected = OPTIONAL in str(report.longrepr) or hasattr(report, "wasxfail")
    if KERNEL and report.skipped and not expected and item.get_closest_marker("lab"):
        report.outcome = "failed"
        report.longrepr = f"a test of the lab was skipped in a guest: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def kernel() -> tuple[int, ...]:
    """The version of the kernel that runs, as (6, 1), to compare with."""
    return tuple(int(part) for part in KERNEL.split("."))


@pytest.fixture(scope="session")
def results() -> Path:
    """A folder whose files are brought out of the guest."""
    return Path(os.environ["SCOPE_EBPF_LAB_RESULTS"])


@pytest.fixture(scope="session")
def row(results: Path) -> Callable[..., None]:
    """A function that adds one row to the table of `make lab-all`.

    It takes the name, whether it works (None: not offered), the fact, and more fields: `cause`, and
    `warning`, which is shown although it works.
    """

    def add(name: str, works: bool | None, detail: str = "", **more: str) -> None:
        path = results / f"row-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
        document = {"name": name, "works": works, "detail": detail, "cause": "", **more}
        path.write_text(json.dumps(document))

    return add
