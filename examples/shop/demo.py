"""What `make demo` runs: the whole shop under load, and scope-ebpf attached to it as a user would.

At the end Redis is killed and one more request made. Then scope-ebpf shows the slowest requests,
what one checkout led to, from nginx to the worker that sends the mail, and why the last one failed.

Everything is real and private: the servers run in a temporary directory and are ended with it; the
recording stays for a look afterwards.
"""

import argparse
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from interrupts import Terminated, interrupts
from load import LoadResult, run_load
from service import Market, ShopError

_RECORDER_START_SECONDS = 60.0
# Writing the last segments, and the summary.
_RECORDER_END_SECONDS = 30.0
# Requests with all their tables of a recording as long as --seconds allows.
_SHOW_SECONDS = 300.0
# The last mails are sent, and what the failed request did is over.
_SETTLE_SECONDS = 1.0
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
    parser.add_argument("--workers", type=int, default=2, help="of each service (default: 2)")
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
    _say(sys.stderr, "starting nginx, three services, PostgreSQL, Redis and the mail worker …")
    with Market(workers=options.workers) as market:
        _say(sys.stderr, f"the shop is at {market.url}; {options.clients} clients are buying")
        try:
            _trace(options, market, output)
        except (KeyboardInterrupt, Terminated):
            # A recording that was ended early is a good recording.
            if output.exists():
                _say_next_steps(executable, output)
            raise
    _show(executable, output)
    _say_next_steps(executable, output)


def _trace(options: argparse.Namespace, market: Market, output: Path) -> None:
    """Record the shop while customers buy, then while it fails."""
    # The clients are there before the recorder, as in real life: it finds open connections.
    with (
        _load_in_background(market.url, options.clients) as load,
        _recording(_attach_command(options.scope_ebpf, market, output), output) as recorder,
    ):
        _pause(recorder, options.seconds)
        result = load.finish()
        _pause(recorder, _SETTLE_SECONDS)
        market.check()
        _say(sys.stderr, f"$ kill -KILL {market.pids['redis']}    # Redis")
        market.kill("redis")
        status = _status_of(market.url, "/products/1")
        _say(sys.stderr, f"$ curl {market.url}/products/1    # answered with {status}")
        _pause(recorder, _SETTLE_SECONDS)
    _judge(result, status, output)


def _attach_command(executable: Path, market: Market, output: Path) -> list[str]:
    command = [str(executable), "attach"]
    for pid in market.pids.values():
        command += ["--pid", str(pid)]
    return [*command, "-o", str(output)]


class _Load:
    """Customers, on a thread of their own until `finish`."""

    def __init__(self, url: str, clients: int) -> None:
        self._stop = threading.Event()
        self._results: list[LoadResult] = []
        self._thread = threading.Thread(target=self._run, args=(url, clients), daemon=True)
        self._thread.start()

    def _run(self, url: str, clients: int) -> None:
        result = run_load(
            url, seconds=3600, clients=clients, think_seconds=_THINK_SECONDS, stop=self._stop
        )
        self._results.append(result)

    def finish(self) -> LoadResult:
        """Let each customer end what it does; may be called again."""
        with interrupts.held():
            self._stop.set()
            self._thread.join()
        if not self._results:
            raise DemoError("the load ended by an error of its own, see above; please report this")
        return self._results[0]


@contextmanager
def _load_in_background(url: str, clients: int) -> Iterator[_Load]:
    load = _Load(url, clients)
    try:
        yield load
    finally:
        load.finish()


@contextmanager
def _recording(command: list[str], output: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Record during the block; on any interruption let the recorder end normally, then go on.

    It gets a session of its own. In ours, Ctrl-C would reach it from the terminal and SIGTERM
    would not; now both are handled here, and it always gets exactly one SIGINT and time for its
    summary, while the traced services still live.
    """
    _say(sys.stderr, f"$ {shlex.join(command)}")
    recorder: subprocess.Popen[bytes] | None = None
    try:
        with interrupts.held():
            recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + _RECORDER_START_SECONDS
        # It writes this when the probes are at work.
        while not (output / "meta.json").exists():
            if time.monotonic() > deadline:
                raise DemoError(
                    f"the recorder has not begun after {_RECORDER_START_SECONDS:g} s and was"
                    " stopped; run the attach command above by hand to see why"
                )
            _pause(recorder, 0.05)
        yield recorder
    except OSError as error:
        if recorder is None:
            raise DemoError(f"cannot run {command[0]}: {error.strerror}; run make setup") from None
        raise
    except (KeyboardInterrupt, Terminated):
        _say(sys.stderr, "interrupted: ending the recording, then the services …")
        raise
    finally:
        with interrupts.held():
            _end_recorder(recorder)
    if recorder.returncode != 0:
        raise _recorder_failed(recorder.returncode)


def _pause(recorder: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait while the recorder records."""
    try:
        code = recorder.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    if code == 0:
        raise DemoError("the recorder has ended by itself, see its summary above")
    raise _recorder_failed(code)


def _recorder_failed(code: int) -> DemoError:
    how = f"with code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    return DemoError(f"the recorder ended {how}; its own message is above")


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


def _status_of(url: str, path: str) -> int:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=20)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise DemoError(f"nginx did not answer: {error!r}; please report this") from None
    finally:
        connection.close()


def _judge(result: LoadResult, status: int, output: Path) -> None:
    if not output.exists():
        raise DemoError(f"the recorder ended well but left no {output}; please report this")
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
    if status < 500:
        raise DemoError(f"without Redis the shop answered {status} and not 5xx; please report this")


def _show(executable: Path, output: Path) -> None:
    """Show what the recording tells of the requests."""
    _run([str(executable), "requests", str(output), "--slow", "10"])
    rows = [row for row in _requests(executable, output) if row["service"] == "nginx"]
    sold = [
        row for row in rows if row["operation"] == "POST /checkout" and str(row["status"]) == "201"
    ]
    failed = [row for row in rows if str(row["status"]).startswith("5")]
    for title, found, chosen_by in (
        ("A checkout, from nginx to the mail", sold, "spans"),
        ("The request that failed", failed, "start_ns"),
    ):
        if not found:
            raise DemoError(
                f"{title.lower()}: the recording has no such request of nginx; see what it has"
                f" with {shlex.join([str(executable), 'requests', str(output)])}"
            )
        chosen = max(found, key=lambda row, by=chosen_by: int(row[by]))  # type: ignore[misc]
        _say(sys.stdout, f"\n{title}:")
        _run([str(executable), "chain", str(output), str(chosen["request_id"])])


def _requests(executable: Path, output: Path) -> list[dict[str, Any]]:
    """All requests of the recording: one object of JSON a line."""
    text = _run([str(executable), "requests", str(output), "--json"], captured=True)
    return [json.loads(line) for line in text.splitlines()]


def _run(command: list[str], *, captured: bool = False) -> str:
    """Run a command of scope-ebpf for its output on the screen, or to read it."""
    if not captured:
        _say(sys.stdout, f"$ {shlex.join(command)}")
    try:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if captured else None,
            text=True,
            timeout=_SHOW_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DemoError(f"{command[1]} has not ended within {_SHOW_SECONDS:g} s") from None
    if ran.returncode != 0:
        raise DemoError(f"{command[1]} ended with code {ran.returncode}; its message is above")
    return ran.stdout or ""


def _say_next_steps(executable: Path, output: Path) -> None:
    # The recording belongs to root then, and is for its owner's eyes only.
    sudo = ["sudo"] if os.geteuid() == 0 and "SUDO_USER" in os.environ else []
    looks = [
        [*sudo, str(executable), "services", str(output)],
        [*sudo, str(executable), "requests", str(output), "--service", "rq"],
        [*sudo, str(executable), "threads", str(output)],
        [*sudo, str(executable), "flame", str(output), "--offcpu", "-o", "waits.svg"],
        [*sudo, str(executable), "events", str(output), "messages", "--limit", "5"],
        [str(executable), "--help"],
    ]
    shown = "".join(f"\n  {shlex.join(look)}" for look in looks)
    _say(sys.stdout, f"\nThe recording is in {output}. Look further with:{shown}")


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
