"""Being recorded harms nobody: however often probes come and go, and whenever a recorder is killed.

All that was in the kernel before is compared with all that is there afterwards; the kernel's log must be
without a complaint, the target's code without a breakpoint, and the target, which checks itself all along,
must have found nothing.

By default so often that a run on an emulated CPU stays short; in full, by one transport in 20 to 35 minutes:

    vagrant/lab.py run 6.1 --memory 1536 --timeout 9000 --command 'LAB_LOADS=1000 LAB_KILLS=200 LAB_COMMANDS=3
        python -m pytest -o session_timeout=100000 -k "rings or seen" tests/lab/test_harm.py'
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab.leftovers import TRACING, Leftovers, nothing_left
from tests.lab.recorded import COMMAND, ENVIRONMENT, Way, recording, ways
from tests.live.harm import code_of
from tests.live.recording import Target

LOADS = int(os.environ.get("LAB_LOADS", "6"))
KILLS = int(os.environ.get("LAB_KILLS", "5"))
# Of each by the command itself, which takes seconds to start.
COMMANDS = int(os.environ.get("LAB_COMMANDS", "1"))
SEED = int(os.environ.get("LAB_SEED", "5"))
# Loads and kills together take so long at most, each.
PATIENCE_SECONDS = 60 + 10 * (LOADS + KILLS) + 60 * COMMANDS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(PATIENCE_SECONDS)]

HARMED = Path(__file__).with_name("harmed.py")
CAPTURES = Path(__file__).with_name("captures.py")
LEAST_ROUNDS = 3
# A recorder that is killed through the command has been at work for so long at most.
WORK_SECONDS = 2.0
EXIT_SECONDS = 60


def quick_ways() -> list[Way]:
    """Those that need no compiler at each load."""
    return [way for way in ways() if way.loader != "bcc"]


@pytest.fixture
def target(tmp_path):
    """A target that checks itself until the end of the test; its code is as before then."""
    with Target(sys.executable, HARMED, tmp_path) as harmed:
        before = code_of(harmed.pid)
        assert before
        with nothing_left():
            yield harmed
        assert code_of(harmed.pid) == before
        assert harmed.work()["rounds"] >= LEAST_ROUNDS


def captures(mode: str, target: Target, count: int, way: Way) -> str:
    """Run captures.py; returns what it told."""
    chosen = {"loader": way.loader, "transport": way.transport}
    more = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    command = [sys.executable, str(CAPTURES), mode, *map(str, (target.pid, count, SEED)), *more]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def plain_target(tmp_path):
    """The same, and whatever is found is no failure."""
    with Target(sys.executable, HARMED, tmp_path) as harmed:
        yield harmed


def test_a_recorder_at_work_is_seen(plain_target, tmp_path):
    """That the other tests find nothing is worth something only if they would find it."""
    target = plain_target
    leftovers, before = Leftovers(), code_of(target.pid)
    with recording(tmp_path, target, quick_ways()[0]) as session:
        now = leftovers.look()
        for kind in ("prog", "map", "link", "descriptor"):
            assert now[kind] - leftovers.before[kind], kind
        assert code_of(target.pid) != before
        session.stop()
    assert session.code == 0, session.talk
    # a probe by tracefs, as other tools make them, is seen, too
    change_uprobes("p:scope_lab/seen /bin/true:0x1000")
    try:
        assert leftovers.look()["probe"] - leftovers.before["probe"]
    finally:
        change_uprobes("-:scope_lab/seen")
    Path("/dev/kmsg").write_text("<4>WARNING: of the lab's own test\n")
    assert len(leftovers.complaints()) == 1


def change_uprobes(line: str) -> None:
    """Appended: to open it for writing from its start would remove all that are there."""
    # not by open(), which seeks to the end, and not every kernel can do that here
    file = os.open(TRACING / "uprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


@pytest.mark.parametrize("way", quick_ways(), ids=str)
def test_loads(target, way, results):
    """Again and again, in one process: what one turn left would add up."""
    told = json.loads(captures("loads", target, LOADS, way))
    seconds = told["seconds"]
    assert len(seconds) == LOADS
    note = {"loads": LOADS, "median": statistics.median(seconds), "most": max(seconds)}
    (results / f"harm-loads-{way}.json").write_text(json.dumps(note))


@pytest.mark.parametrize("way", quick_ways(), ids=str)
def test_kills(target, way, results):
    """SIGKILL at random moments, of recorders that load, attach or are at work."""
    told = json.loads(captures("kills", target, KILLS, way))
    stages = told["stages"]
    assert sum(stages.values()) == KILLS
    # enough of them to have met each moment that lasts
    if KILLS >= 50:
        assert stages["starting"] and stages["drained"], stages
    note = {"kills": KILLS, "seed": SEED, **told}
    (results / f"harm-kills-{way}.json").write_text(json.dumps(note))


@pytest.mark.parametrize("way", quick_ways(), ids=str)
def test_commands_that_are_stopped(target, way, tmp_path):
    """The command itself, ended in good order."""
    for turn in range(COMMANDS):
        folder = tmp_path / f"stop-{turn}"
        folder.mkdir()
        with recording(folder, target, way) as session:
            session.stop(signal.SIGTERM)
            assert session.wait() == 0, session.talk


@pytest.mark.parametrize("way", quick_ways(), ids=str)
def test_commands_that_are_killed(target, way, tmp_path):
    """The command itself, killed at any moment from its first to some time at work."""
    moments = random.Random(SEED)
    arguments = ["attach", "--pid", str(target.pid), *way.options]
    begin = time.monotonic()
    for turn in range(COMMANDS + 1):
        folder = tmp_path / f"kill-{turn}"
        folder.mkdir()
        with (folder / "talk").open("w") as talk:
            process = subprocess.Popen(
                [*COMMAND, *arguments, "-o", str(folder / "test.scope")],
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=talk,
                stderr=talk,
            )
        try:
            if turn == 0:  # until it is at work: how long that takes
                while "recording " not in (folder / "talk").read_text():
                    assert process.poll() is None, (folder / "talk").read_text()
                    time.sleep(0.02)
                most = time.monotonic() - begin + WORK_SECONDS
            else:
                time.sleep(moments.random() * most)
            assert process.poll() is None, (folder / "talk").read_text()
        finally:
            process.kill()
            process.wait(EXIT_SECONDS)
