"""What a hit of a user's own probe costs the program, and what the family postgres costs a query.

Usage (as root): bench/hits.py
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCOPE_EBPF = Path(sys.executable).with_name("scope-ebpf")
BURST, BURSTS = 2000, 25
QUERIES, ROUNDS = 2000, 5
PROGRAM = r"""
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#define NOTE(name, arguments) \
	".pushsection .note.stapsdt,\"\",\"note\"\n.balign 4\n.4byte 992f-991f, 994f-993f, 3\n" \
	"991: .asciz \"stapsdt\"\n992: .balign 4\n993: .8byte 990b, _.stapsdt.base, 0\n" \
	".asciz \"bench\"\n.asciz \"" name "\"\n.asciz \"" arguments "\"\n994: .balign 4\n.popsection\n"
asm(".pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n.weak _.stapsdt.base\n"
    ".hidden _.stapsdt.base\n_.stapsdt.base: .space 1\n.popsection\n");
asm(".text\n.type pushes,@function\npushes: push %rbp\npop %rbp\nret\n.size pushes,.-pushes\n"
    ".type moves,@function\nmoves: mov %rdi, %rax\nret\n.size moves,.-moves\n");
void pushes(long);
void moves(long);
int main(void)
{
	const char *text = "SELECT id, owner FROM accounts WHERE id = 1";
	struct timespec a, b, nap = {.tv_nsec = 30000000};
	char gate;
	puts("ready");
	fflush(stdout);
	for (int burst = 0; burst < BURSTS && read(0, &gate, 1) == 1; burst++) {
		clock_gettime(CLOCK_MONOTONIC, &a);
		for (long i = 0; i < BURST; i++) {
			asm volatile("990: nop\n" NOTE("none", ""));
			asm volatile("990: nop\n" NOTE("three", "8@%[i] -4@8(%[t]) 8@$7") : : [i] "r"(i), [t] "r"(text));
			asm volatile("990: nop\n" NOTE("text", "8@%[t]") : : [t] "r"(text));
			pushes(i);
			moves(i);
		}
		clock_gettime(CLOCK_MONOTONIC, &b);
		printf("%f\n", ((b.tv_sec - a.tv_sec) * 1e9 + b.tv_nsec - a.tv_nsec) / BURST);
		fflush(stdout);
		nanosleep(&nap, NULL);
	}
	return 0;
}
"""
VARIANTS = {
    "USDT, no argument": ("usdt:{0}:bench:none",),
    "USDT, three numbers": ("usdt:{0}:bench:three",),
    "USDT, a text of 44 bytes": ("usdt:{0}:bench:text(sql)",),
    "function that begins with a push": ("uprobe:{0}:pushes(long)",),
    "the same, entry to return": ("uretprobe:{0}:pushes(long)",),
    "function that begins with a mov (single-stepped)": ("uprobe:{0}:moves(long)",),
}


@contextmanager
def recording(path: Path, pid: int, *options: object) -> Iterator[None]:
    """`scope-ebpf attach` at work."""
    command = [SCOPE_EBPF, "attach", "--pid", pid, "-o", path, *options]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while line and not line.startswith("recording "):
            line = process.stderr.readline()
        assert line, "it ended"
        try:
            yield
        finally:
            if process.poll() is None:
                process.send_signal(2)
            process.communicate()
    shutil.rmtree(path)


def nanoseconds(
    program: Path, folder: Path, specs: tuple[str, ...], *, other: bool = False
) -> float:
    """Median time of a round of the program's loop."""
    with (
        subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
        subprocess.Popen(["sleep", "1000"]) as sleep,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        found: list[float] = []

        def burst() -> None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("x")
            process.stdin.flush()
            found.append(float(process.stdout.readline()))

        if not specs:
            for _ in range(BURSTS):
                burst()
        else:
            options = [part for spec in specs for part in ("--probe", spec.format(program))]
            pid = sleep.pid if other else process.pid
            with recording(folder / "bench.scope", pid, "--families", "processes", *options):
                for _ in range(BURSTS):
                    burst()
                    time.sleep(0.03)
        process.kill()
        sleep.kill()
    return statistics.median(found)


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = folder / "hits"
        flags = [
            f"-DBURST={BURST}",
            f"-DBURSTS={BURSTS}",
            "-O1",
            "-x",
            "c",
            "-",
            "-o",
            str(program),
        ]
        subprocess.run(["gcc", *flags], input=PROGRAM, text=True, check=True)
        nothing = nanoseconds(program, folder, ())
        print(f"{'per round of the loop, nothing recorded':55} {nothing:8.0f} ns")
        for title, specs in VARIANTS.items():
            added = nanoseconds(program, folder, specs) - nothing
            print(f"{title:55} {added:8.0f} ns per hit")
        added = nanoseconds(program, folder, VARIANTS["USDT, three numbers"], other=True) - nothing
        print(f"{'USDT, in a process that is not recorded':55} {added:8.0f} ns per hit")
        postgres(folder)


def postgres(folder: Path) -> None:
    """Latency of a small query over a local connection, in turns with and without recording."""
    sys.path.insert(0, str(ROOT))
    from tests.live import test_hits

    with test_hits.postgres_server() as (pid, port):
        _postgres(folder, pid, port, test_hits.connect)


def _postgres(folder: Path, pid: int, port: int, connect: Callable[[int], Any]) -> None:
    found: dict[str, list[float]] = {}
    choices = {
        "not recorded": None,
        "--families postgres": "postgres",
        "default families": ",".join(("syscalls", "messages", "tls", "offcpu")),
        "default and postgres": "+postgres",
    }
    for _ in range(ROUNDS):
        for title, families in choices.items():
            connection = connect(port)
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
                if families is None:
                    found.setdefault(title, []).append(median_query(cursor))
                else:
                    path = folder / "pg.scope"
                    with recording(path, pid, "--families", families):
                        found.setdefault(title, []).append(median_query(cursor))
            connection.close()
    base = statistics.median(found["not recorded"])
    for title, times in found.items():
        middle = statistics.median(times)
        print(f"a query, {title:46} {middle:8.1f} us ({middle - base:+.1f})")


def median_query(cursor: Any) -> float:
    """Microseconds."""
    times = []
    for number in range(QUERIES):
        before = time.perf_counter_ns()
        cursor.execute(f"SELECT {number} WHERE 'x' <> 'y'")
        times.append(time.perf_counter_ns() - before)
    return statistics.median(times) / 1000


if __name__ == "__main__":
    main()
