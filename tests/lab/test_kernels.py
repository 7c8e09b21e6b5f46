"""On each kernel of the lab: what the doctor says of it is right, and counts are exact."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf.families import FAMILIES
from tests.live.recording import Target, attached, compiled, no_losses

pytestmark = pytest.mark.lab

COMMAND = Path(sys.executable).with_name("scope-ebpf")
# What a kernel refuses, and a word of the reason. Nothing else may fail there.
REFUSED: dict[tuple[int, ...], dict[str, str]] = {}
# The smallest program that needs the kernel's headers.
BCC_PROGRAM = """
#include <linux/sched.h>
TRACEPOINT_PROBE(sched, sched_process_exit) {
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    bpf_trace_printk("%d", task->tgid);
    return 0;
}
"""


@pytest.fixture(scope="module")
def doctor(results):
    """What `scope-ebpf doctor --json` says in this guest; goes into the table, too."""
    done = subprocess.run(
        [COMMAND, "doctor", "--json"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout, f"the doctor failed with {done.returncode}: {done.stderr}"
    (results / "doctor.json").write_text(done.stdout)
    return json.loads(done.stdout)


def test_this_is_the_kernel_that_was_asked_for(kernel):
    assert platform.release().startswith(".".join(map(str, kernel)) + ".")
    assert os.geteuid() == 0


def test_the_emulated_cpu_computes_right():
    values = [i % 60 + 1 for i in range(75)]
    keys = [i % 3 for i in range(75)]
    frame = pl.DataFrame({"key": keys, "value": pl.Series(values, dtype=pl.UInt32)})
    sums = dict(frame.group_by("key").agg(pl.col("value").sum()).iter_rows())
    assert sums == {
        key: sum(v for k, v in zip(keys, values, strict=True) if k == key) for key in (0, 1, 2)
    }


def test_doctor(doctor, kernel):
    refused = REFUSED.get(kernel, {})
    assert set(doctor["families"]) == set(FAMILIES)
    checks = {check["name"]: check for check in doctor["checks"] if check["family"]}
    for family, works in doctor["families"].items():
        check = checks[family]
        if family in refused:
            assert not works and refused[family] in check["cause"]
        else:
            assert works, f"{family}: {check['detail']}: {check['cause']}"
    for check in doctor["checks"]:
        if not check["family"]:
            assert check["works"] is not False, f"{check['name']}: {check['detail']}"


def test_exact_counts(tmp_path):
    program = compiled("calls", tmp_path)
    with (
        Target(program, "counts") as target,
        attached(tmp_path, target) as session,
    ):
        target.work()
    no_losses(session)
    rows = session.table("syscalls")
    counted = rows.filter(name="getppid", arg0=1)
    assert counted["arg1"].to_list() == list(range(1009))
    assert counted["result"].unique().to_list() == [os.getpid()]
    times = {"openat": 503, "dup3": 307, "mprotect": 101, "close": 211}
    errors = {"openat": "ENOENT", "dup3": "EINVAL", "mprotect": "EINVAL", "close": "EBADF"}
    for name, number in times.items():
        assert len(rows.filter(name=name, error=errors[name])) == number
    ended = session.table("processes").filter(tgid=target.pid, event="exit")
    assert len(ended) == 1


def test_bcc_compiles(row, kernel):
    # In a process of its own: what clang says comes on its stderr, whatever Python does.
    script = f"from bcc import BPF\nbpf = BPF(text={BCC_PROGRAM!r})\nbpf.cleanup()\nprint('loaded')"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script], capture_output=True, text=True, check=False, timeout=100
    )
    version = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "python3-bpfcc"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    loaded = done.stdout == "loaded\n"
    said = done.stderr.splitlines()
    first = next((line for line in said if "error:" in line), "")
    first = first or next((line for line in said if "warning:" in line), "")
    warning = f"BCC {version} on the headers of Linux {platform.release()}: {first}"
    row("headers for bcc", loaded, warning, **({"warning": warning} if loaded and first else {}))
    assert loaded, done.stderr
