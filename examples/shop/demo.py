"""What `make demo` runs: the shop under load, and scope-ebpf attached to it as a user would.

Everything is real and private: PostgreSQL, Redis and gunicorn run in a temporary directory and
are ended with it; the recording stays for a look afterwards.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from interrupts import Terminated, interrupts
from load import LoadResult, run_load
from service import Shop, ShopError

# Attaching (compiling, loading) and writing the summary come on top of the recorded time.
_RECORDER_EXTRA_SECONDS = 120.0
_RECORDER_END_SECONDS = 20.0
# Enough for the workers to be mostly busy, not so much that requests only wait for each other.
_THINK_SECONDS = 0.02


class DemoError(Exception):
    """The demo cannot go on; the message says what, why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo: 0 when all went well, 1 with one sentence when not, 2 when misused."""
    options = _parse(arguments)
    try:
        with interrupts:
            _demo(options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Terminated as error:
        return 128 + error.signum
    except (DemoError, ShopError, OSError) as error:
        _say(sys.stderr, f"error: {error}")
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Start a private shop, put load on it and record it with scope-ebpf.",
        epilog="example: sudo .venv/bin/python examples/shop/demo.py --seconds 20",
    )
    parser.add_argument(
        "--scope-ebpf",
        type=Path,
        metavar="PATH",
        # Not resolved: in a virtual environment, python is a link to elsewhere.
        default=Path(sys.executable).parent / "scope-ebpf",
        help="the command to run (default: the one next to this Python)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="the recording (default: shop.scope, or shop-2.scope, …)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="record so long (default: 10)")
    parser.add_argument("--workers", type=int, default=2, help="gunicorn workers (default: 2)")
    parser.add_argument("--clients", type=int, default=4, help="load's connections (default: 4)")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds <= 600:
        parser.error("--seconds must be above 0 and at most 600")
    if not 1 <= options.workers <= 64 or not 1 <= options.clients <= 64:
        parser.error("--workers and --clients must be from 1 to 64")
    return options


def _demo(options: argparse.Namespace) -> None:
    executable: Path = options.scope_ebpf
    if not os.access(executable, os.X_OK) or executable.is_dir():
        raise DemoError(
            f"cannot run {executable}: it is not there or not executable;"
            " run make setup first, or say where it is with --scope-ebpf"
        )
    output: Path = options.output or _unused(Path("shop.scope"))
    if output.exists():
        raise DemoError(f"will not overwrite {output}; remove it or choose another with -o")
    _say(sys.stderr, "starting PostgreSQL, Redis and gunicorn privately …")
    with Shop(workers=options.workers) as shop:
        _say(sys.stderr, f"the shop is at {shop.url}; {options.clients} clients are buying")
        bound = options.seconds + _RECORDER_EXTRA_SECONDS + _RECORDER_END_SECONDS
        with _load_in_background(shop.url, bound, options.clients) as results:
            try:
                _record(_attach_command(executable, shop, output, options.seconds), options.seconds)
            except (KeyboardInterrupt, Terminated):
                # A recording that was ended early is a good recording.
                if output.exists():
                    _say_next_steps(executable, output)
                raise
        shop.check()
    _judge(results, output)
    _say_next_steps(executable, output)


def _attach_command(executable: Path, shop: Shop, output: Path, seconds: float) -> list[str]:
    command = [str(executable), "attach"]
    for name in ("gunicorn", "postgres", "redis"):
        command += ["--pid", str(shop.pids[name])]
    return [*command, "-o", str(output), "--duration", f"{seconds:g}s"]


@contextmanager
def _load_in_background(url: str, seconds: float, clients: int) -> Iterator[list[LoadResult]]:
    """Keep load on the shop during the block; its result is in the list afterwards."""
    stop = threading.Event()
    results: list[LoadResult] = []

    def load() -> None:
        results.append(
            run_load(url, seconds=seconds, clients=clients, think_seconds=_THINK_SECONDS, stop=stop)
        )

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        yield results
    finally:
        with interrupts.held():
            stop.set()
            thread.join()


def _record(command: list[str], seconds: float) -> None:
    """Run the recorder to its end; on any interruption let it end normally, then go on ending.

    It gets a session of its own. In ours, Ctrl-C would reach it from the terminal and SIGTERM
    would not; now both are handled here, and it always gets exactly one SIGINT and time for its
    summary, while the traced services still live.
    """
    _say(sys.stderr, f"$ {shlex.join(command)}")
    recorder: subprocess.Popen[bytes] | None = None
    try:
        with interrupts.held():
            recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        code = recorder.wait(seconds + _RECORDER_EXTRA_SECONDS)
    except subprocess.TimeoutExpired:
        with interrupts.held():
            _end_recorder(recorder)
        raise DemoError(
            f"the recorder did not end {_RECORDER_EXTRA_SECONDS:g} s after its duration of"
            f" {seconds:g} s and was stopped; run the attach command above by hand to see why"
        ) from None
    except OSError as error:
        raise DemoError(f"cannot run {command[0]}: {error.strerror}; run make setup") from None
    except BaseException:
        with interrupts.held():
            _say(sys.stderr, "interrupted: ending the recording, then the services …")
            _end_recorder(recorder)
        raise
    if code != 0:
        how = f"with code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        raise DemoError(f"the recorder ended {how}; its own message is above")


def _end_recorder(recorder: subprocess.Popen[bytes] | None) -> None:
    if recorder is None or recorder.poll() is not None:
        return
    for signum, seconds in ((signal.SIGINT, _RECORDER_END_SECONDS), (signal.SIGTERM, 5.0)):
        recorder.send_signal(signum)
        with suppress(subprocess.TimeoutExpired):
            recorder.wait(seconds)
            return
    _say(
        sys.stderr, "the recorder does not end by itself: killing it; its recording may lack an end"
    )
    # Not reaped yet, so its group is still its own.
    os.killpg(recorder.pid, signal.SIGKILL)
    recorder.wait()


def _judge(results: list[LoadResult], output: Path) -> None:
    if not output.exists():
        raise DemoError(f"the recorder ended well but left no {output}; please report this")
    if not results:
        raise DemoError("the load ended by an error of its own, see above; please report this")
    result = results[0]
    failed = sum(result.errors.values())
    _say(
        sys.stderr,
        f"the load: {result.requests} requests, {failed} failed, p50 {result.p50_ms:g} ms,"
        f" p99 {result.p99_ms:g} ms",
    )
    if failed:
        raise DemoError(
            f"the shop failed requests (status: count, 0 is no answer): {result.errors};"
            " try again on a less busy machine"
        )


def _say_next_steps(executable: Path, output: Path) -> None:
    # The recording belongs to root then, and is for its owner's eyes only.
    sudo = ["sudo"] if os.geteuid() == 0 and "SUDO_USER" in os.environ else []
    look = shlex.join([*sudo, str(executable), "events", str(output), "messages", "--limit", "5"])
    _say(
        sys.stdout,
        f"\nThe recording is in {output}. Look further with:\n"
        f"  {look}\n"
        f"  {shlex.join([str(executable), '--help'])}",
    )


def _unused(path: Path) -> Path:
    """Return the path, numbered if it is taken: a demo overwrites nobody's recording."""
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return free


def _say(stream: TextIO, text: str) -> None:
    """Print, even if nobody is left to read: after a hang-up the clean-up must go on."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
