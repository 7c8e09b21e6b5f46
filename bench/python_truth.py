"""How right stacks and logical contexts of Python are: targets that know the truth, at every size.

The targets and the comparison are those of the live tests (tests/live), which run smaller sizes of
them: servers whose requests carry their ids in their bytes, with up to 1,000 at the same time on one
thread, and a program that knows its own stack at any moment. Besides, a server is attached to and let go
again and again while it answers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from chains_truth import count_row, recorder
from results import Section
from setting import SCOPE_EBPF, Setting
from tracers import Tracer, lost_in_all, scope_ebpf

from scope_ebpf import open_recording
from tests.live.contexts import KINDS, Compared, Kind, compare, serving, serving_kind
from tests.live.harm import attach_often, code_of, load, private_python
from tests.live.pythons import pythons
from tests.live.recording import PROGRAMS, Target
from tests.live.roots import clear, running, within
from tests.live.stacks import Compared as Stacks
from tests.live.stacks import Source, Truth, samples_of
from tests.live.stacks import compare as compare_stacks

NAME = "python"
TITLE = "Stacks and logical contexts of Python beside the truth"
CONCURRENCY, QUICK_CONCURRENCY = (1, 10, 100, 1000), (10, 100)
# Requests of each kind of server at each number at the same time.
REQUESTS, QUICK_REQUESTS = 2000, 100
# One at a time takes as long as its sleeps.
ALONE_REQUESTS = 200
HZ = 999
STACK_SECONDS, QUICK_STACK_SECONDS = 10, 2
DEPTH = 12
ATTACHES, QUICK_ATTACHES = 1000, 20
LEAST_RIGHT = 0.999
# Kinds of servers of which less is expected are told apart.
LEAST_LINKED = 0.98
# A server's answers are out before its last bookkeeping.
SETTLE_SECONDS = 0.2


def measure(setting: Setting) -> Section:
    """Contexts of each kind of server, stacks of each interpreter, then the harm that it does."""
    section = Section(NAME, TITLE)
    missing: dict[str, float] = {}
    spawned: list[Compared] = []
    wrong = Compared()
    with serving("contexts_backend") as backend:
        for kind in KINDS:
            with serving_kind(kind, backend) as server:
                for concurrency in QUICK_CONCURRENCY if setting.quick else CONCURRENCY:
                    what = f"{kind}, {concurrency} at the same time"
                    setting.say(f"{NAME}: {what}")
                    path = setting.path("contexts.scope")
                    with recorder(path, [server.pid, backend.pid]):
                        ids = server.ask(requests(setting, concurrency), concurrency)
                        time.sleep(SETTLE_SECONDS)
                    found = compare(open_recording(path), server.pid, ids)
                    tell(section, what, kind, found, lost_in_all(path))
                    if kind.share >= LEAST_LINKED:
                        missing[what] = (1 - found.share) / (1 - kind.share)
                    else:
                        spawned.append(found)
                    wrong.wrong += found.wrong
                    wrong.wrong_edges += found.wrong_edges
                    wrong.wrong_contexts += found.wrong_contexts if kind.contexts else 0
    section.ask("calls below another request: none", 0, "", wrong.wrong)
    section.ask("wrong edges: none", 0, "", wrong.wrong_edges)
    section.ask("sends in another request's context: none", 0, "", wrong.wrong_contexts)
    worst = max(missing, key=missing.__getitem__)
    unlinked = 100 * sum(found.unlinked + found.unseen for found in spawned)
    section.ask(
        "calls that are not linked: at most 0.5 % (uvloop 2 %), in each run; in parts of that",
        1, "", missing[worst], worst,
    )  # fmt: skip
    section.ask(
        "calls that are not linked where greenlets spawn greenlets: at most 0.5 %",
        0.5, "%", unlinked / sum(found.calls for found in spawned), "what spawned one is not known",
    )  # fmt: skip
    stacks(setting, section)
    harm(setting, section)
    return section


def requests(setting: Setting, concurrency: int) -> int:
    """How many requests a run has; each connection has at least one."""
    wanted = QUICK_REQUESTS if setting.quick else REQUESTS
    return min(wanted, ALONE_REQUESTS) if concurrency == 1 else max(wanted, concurrency)


def tell(section: Section, what: str, kind: Kind, found: Compared, lost: int) -> None:
    """One run: numbers, and examples of what is wrong."""
    contexts = (
        f"; sends {found.sends:,}, wrong contexts {found.wrong_contexts:,}, none {found.no_context:,}"
        if kind.contexts
        else ""
    )
    section.rows.append(
        count_row(
            f"{what}: calls linked",
            found.linked,
            f"of {found.calls:,} ({found.share:.3%}); wrong {found.wrong:,}, unlinked"
            f" {found.unlinked:,}, unseen {found.unseen:,}, wrong edges {found.wrong_edges:,}"
            f"{contexts}; lost records {lost:,}",
        )
    )
    if found.wrong or found.wrong_edges or found.share < kind.share:
        section.notes += [f"{what}: {example}" for example in found.examples]


def stacks(setting: Setting, section: Section) -> None:
    """Each interpreter alone with its recorder."""
    seconds = QUICK_STACK_SECONDS if setting.quick else STACK_SECONDS
    source = Source(PROGRAMS / "self_stack.py")
    found: list[Stacks] = []
    for python in pythons():
        setting.say(f"{NAME}: stacks of {python}")
        with ExitStack() as stack:
            stack.callback(clear, python)
            log, inside = within(python, "self_stack.log", setting.directory)
            program = PROGRAMS / "self_stack.py"
            command = running(python, program, inside, seconds, 1, DEPTH)
            target = stack.enter_context(Target(*command))
            path = setting.path("stacks.scope")
            with attached(path, [target.pid]):
                target.open_gate()
                truth = Truth(log, 0, target.note()[0])
            samples = samples_of(open_recording(path), target.pid)
            found.append(compare_stacks(samples, truth, source))
            log.unlink()
        each = found[-1]
        section.rows.append(
            count_row(
                f"{python}: stacks right",
                each.right,
                f"of {each.samples:,} ({each.share:.3%}); impossible {each.impossible:,}; lines wrong"
                f" {each.wrong_lines:,} of {each.lines:,}; {dict(each.reasons)}",
            )
        )
        section.notes += [f"{python}: {example}" for example in each.examples]
    worst = min((each.share for each in found), default=None)
    section.ask(
        "stacks that are not right: at most 0.1 %, in each interpreter",
        1 - LEAST_RIGHT, "", None if worst is None else 1 - worst,
    )  # fmt: skip
    section.ask("stacks that cannot be: none", 0, "", sum(each.impossible for each in found))
    section.ask("wrong lines: none", 0, "", sum(each.wrong_lines for each in found))


def attached(path: Path, pids: Sequence[int]) -> Tracer:
    """The recorder at a high rate."""
    return scope_ebpf(SCOPE_EBPF, pids, path, more=("--sample-hz", str(HZ)))


def harm(setting: Setting, section: Section) -> None:
    """Attach to a server under load and let it go, again and again; its code must be as before."""
    count = QUICK_ATTACHES if setting.quick else ATTACHES
    setting.say(f"{NAME}: attached {count} times")
    kind = next(kind for kind in KINDS if kind.name == "uvloop-streams-pool")
    with tempfile.TemporaryDirectory(prefix="scope-bench-python-") as place:
        python, environment = private_python(Path(place))
        with (
            serving("contexts_backend") as backend,
            serving_kind(kind, backend, python, environment) as server,
        ):
            server.ask(10, 2)
            before = code_of(server.pid, Path(place))
            begun = time.monotonic()
            with load(server):
                attach_often([server.pid], count)
            seconds = time.monotonic() - begun
            changed = code_of(server.pid, Path(place)) != before
    section.rows.append(
        count_row("attached and detached under load", count, f"{seconds / count:.2f} s each time")
    )
    section.ask("a target's code after the last one: as before", 0, "", float(changed))
