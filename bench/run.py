"""`make bench`: measures how good scope-ebpf is on this machine, beside what was asked for.

Each measurement is a module with NAME, TITLE and measure(). Everything that is started ends with
the run, however it ends, and is bounded in time and number anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

# the targets that know the truth are those of the live tests
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bytes_per_row
import call_cost
import chains_scale
import chains_truth
import first_event
import many_processes
import python_cost
import python_truth
import shop_overhead
import summary_time
import sustained
from results import Report, Section
from setting import ROOT, Setting, describe_machine

MEASUREMENTS = {
    module.NAME: module
    for module in (
        call_cost,
        python_cost,
        python_truth,
        sustained,
        many_processes,
        shop_overhead,
        first_event,
        bytes_per_row,
        summary_time,
        chains_truth,
        chains_scale,
    )
}
OUTPUT = ROOT / "build" / "bench"
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write results.json and results.md; 1 if something could not be measured."""
    options = parse(arguments)
    if os.geteuid() != 0:
        print("error: cannot load BPF programs: not root; run sudo make bench", file=sys.stderr)
        return 1
    for signum in ENDING_SIGNALS:
        signal.signal(signum, interrupt)
    begun = time.monotonic()
    failed = False
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="scope-bench-"))
        setting = Setting(Path(directory), stack, options.quick)
        started = datetime.now(timezone.utc).isoformat(" ", "seconds")
        report = Report(describe_machine(setting), options.quick, started)
        for name in options.only or MEASUREMENTS:
            module, section_begun = MEASUREMENTS[name], time.monotonic()
            try:
                section: Section = module.measure(setting)
            except (RuntimeError, OSError) as error:
                setting.say(f"{name} failed: {error}")
                section = Section(name, module.TITLE, notes=[f"failed: {error}"])
                failed = True
            section.seconds = time.monotonic() - section_begun
            report.sections.append(section)
    report.seconds = time.monotonic() - begun
    write(report, options.output)
    print(report.to_markdown())
    return int(failed)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure scope-ebpf on this machine, beside perf, bpftrace, strace and BCC.",
        epilog="measurements:\n"
        + "\n".join(f"  {name:14} {module.TITLE}" for name, module in MEASUREMENTS.items())
        + "\n\nexamples:\n  sudo .venv/bin/python bench/run.py --quick"
        "\n  sudo .venv/bin/python bench/run.py --only call-cost --only first-event -o /tmp/bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=MEASUREMENTS,
        metavar="NAME",
        help="only this measurement, of those below; may be given more than once",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="some minutes: shows that all works, not how fast it is",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help="where results.json and results.md go (default: build/bench)",
    )
    return parser.parse_args(arguments)


def interrupt(_signum: int, _frame: FrameType | None) -> None:
    """End everything that was started, on the way out; once is enough."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def write(report: Report, directory: Path) -> None:
    """Write both files."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    (directory / "results.json").write_text(text + "\n")
    (directory / "results.md").write_text(report.to_markdown())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
