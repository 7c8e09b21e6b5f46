"""How many parents of spans are right: the whole shop under load, compared with what it notes itself."""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from otel_spans import Agreed, agree
from results import Row, Section
from setting import ROOT, SCOPE_EBPF, Setting
from tracers import Tracer, complete_meta, lost_in_all
from truth import Compared, compare

from scope_ebpf import open_recording

NAME = "chains"
TITLE = "Parents of spans beside the truth: the shop behind nginx"
# Workers and threads of each service: gunicorn's sync workers, and its threaded ones.
SERVICES = {"sync workers, 2×1": (2, 1), "threads, 2×8": (2, 8)}
CLIENTS = (1, 10, 100)
REQUESTS, QUICK_REQUESTS = 1500, 200
OTEL_CLIENTS = 10
# Few checkouts, because the worker forks for each of their mails, and those are waited for.
MIX = {"product": 65, "list": 15, "checkout": 5, "order": 15}
LOAD_SECONDS = 60.0
DRAIN_SECONDS = 40.0
# The last answers' own ends, and a worker's bookkeeping behind its last job.
SETTLE_SECONDS = 0.5
MOST_WRONG, MOST_MISSING = 0.001, 0.01


def measure(setting: Setting) -> Section:
    """Each kind of worker at each number of clients; then OpenTelemetry's spans beside ours."""
    section = Section(NAME, TITLE)
    found: dict[str, Compared] = {}
    for workers, (processes, threads) in SERVICES.items():
        with market(workers=processes, threads=threads, truth=True) as (shop, load):
            for clients in CLIENTS:
                what = f"{workers}, {clients} client{'s' if clients > 1 else ''}"
                setting.say(f"{NAME}: {what}")
                recording = record(setting, section, shop, load, clients)
                found[what] = compare(open_recording(recording), shop.truth_lines())
                tell(section, what, found[what])
    judge(section, found)
    setting.say(f"{NAME}: OpenTelemetry")
    with market(workers=2, threads=8, otel=True) as (shop, load):
        recording = record(setting, section, shop, load, OTEL_CLIENTS)
        tell_agreement(section, agree(open_recording(recording), shop.otel_spans()))
    return section


@contextmanager
def market(**options: Any) -> Iterator[tuple[Any, Any]]:
    """The whole shop at work, and the module that puts load on it."""
    # behind our own folder: both have a module `truth`
    place = str(ROOT / "examples" / "shop")
    sys.path.append(place)
    try:
        service, load = importlib.import_module("service"), importlib.import_module("load")
    finally:
        sys.path.remove(place)
    try:
        with service.Market(**options) as running:
            yield running, load
    except service.ShopError as error:
        raise RuntimeError(f"the shop: {error}") from error


def record(setting: Setting, section: Section, shop: Any, load: Any, clients: int) -> Path:
    """Record one run of the load, until the last job is done; returns the recording."""
    recording = setting.path("chains.scope")
    mails_before = mails_sent(shop)
    with recorder(recording, [pid for name, pid in shop.pids.items() if name != "receiver"]):
        result = load.run_load(
            shop.url,
            requests=QUICK_REQUESTS if setting.quick else REQUESTS,
            clients=clients,
            seconds=LOAD_SECONDS,
            seed=clients,
            mix=MIX,
            with_ids=True,
        )
        if not result.complete or set(result.errors) - {409}:
            raise RuntimeError(f"the load failed: {result.requests} requests, {result.errors}")
        checkouts = sum(each.kind == "checkout" and each.status == 201 for each in result.sent)
        wait_for_mails(shop, mails_before + checkouts)
        time.sleep(SETTLE_SECONDS)
    lost = lost_in_all(recording)
    if lost:
        section.notes.append(f"{clients} clients: {lost:,} records were lost")
    if not complete_meta(recording)["complete"]:
        raise RuntimeError("the recording is not complete")
    return recording


def recorder(recording: Path, pids: Sequence[int]) -> Tracer:
    """`scope-ebpf attach --unredacted`: the ids in the payloads are the truth."""
    command: list[str | Path] = [SCOPE_EBPF, "attach", "--unredacted", "-o", recording]
    for pid in pids:
        command += ["--pid", str(pid)]
    return Tracer(
        "scope-ebpf",
        command,
        recording.with_suffix(".log"),
        is_ready=lambda tracer: "Ctrl-C ends it" in tracer.text(),
        count=lambda _: 0,
    )


def mails_sent(shop: Any) -> int:
    """How many jobs are done: each ends in a row of a table."""
    connection = psycopg2.connect(shop.urls["postgres"])
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM mails")
            (count,) = cursor.fetchone()
            return int(count)
    finally:
        connection.close()


def wait_for_mails(shop: Any, wanted: int) -> None:
    """Wait until so many jobs are done.

    Raises:
        RuntimeError: that takes too long.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    while (sent := mails_sent(shop)) < wanted:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{sent} of {wanted} mails are sent after {DRAIN_SECONDS:.0f} s")
        time.sleep(0.25)


def tell(section: Section, what: str, found: Compared) -> None:
    """What was found in one run: numbers, and what was wrong or missing by kind of link."""
    section.rows.append(
        count_row(
            f"{what}: parents right",
            found.right.total(),
            f"of {found.expected:,} expected; wrong {found.wrong.total():,}, missing"
            f" {found.missing.total():,} ({found.guessed.total():,} of them guessed);"
            f" precision {found.precision:.5f}, recall {found.recall:.5f},"
            f" wrong exact edges {found.exact_wrong}",
        )
    )
    for verdict, counts in (("wrong", found.wrong), ("missing", found.missing)):
        section.notes += [
            f"{what}: {verdict}: {count:,} {kind} ({found.right[kind]:,} right)"
            for kind, count in counts.most_common()
        ]


def judge(section: Section, found: dict[str, Compared]) -> None:
    """The worst of all runs beside what was asked for, and how many links of each kind there were."""
    wrong = {what: 1 - each.precision for what, each in found.items()}
    missing = {what: 1 - each.recall for what, each in found.items()}
    worst_wrong = max(wrong, key=wrong.__getitem__)
    worst_missing = max(missing, key=missing.__getitem__)
    section.ask(
        f"wrong parents: at most {MOST_WRONG:.1%} of those claimed, in each run",
        MOST_WRONG, "", wrong[worst_wrong], worst_wrong,
    )  # fmt: skip
    section.ask(
        f"missing parents: at most {MOST_MISSING:.0%} of those expected, in each run",
        MOST_MISSING, "", missing[worst_missing], worst_missing,
    )  # fmt: skip
    exact = sum(each.exact_wrong for each in found.values())
    section.ask("wrong exact edges: none, in all runs", 0, "", exact)
    right = sum((each.right for each in found.values()), Counter[str]())
    section.notes += [f"right in all runs: {count:,} {what}" for what, count in right.most_common()]


def tell_agreement(section: Section, agreed: Agreed) -> None:
    """OpenTelemetry's parents beside ours; a comparison of two accounts, and no target."""
    for kind, counts in agreed.kinds.items():
        section.rows.append(
            count_row(
                f"OpenTelemetry, {kind}: same parent",
                counts["same"],
                f"of {counts.total():,}: {counts['other']:,} another parent, {counts['none']:,} no"
                f" parent, {counts['unseen']:,} that we have no span of",
            )
        )
    section.notes.append(
        f"OpenTelemetry: {agreed.share:.4%} of {agreed.total:,} parents that it has are ours, too"
    )


def count_row(what: str, count: int, note: str) -> Row:
    """A row of one count."""
    return Row(what, "", count, count, count, note=note)
