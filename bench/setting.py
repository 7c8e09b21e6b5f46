"""Where and how a run takes place: the machine, its CPUs and tools, and the temporary directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from getppid import SOURCE, Getppid
from programs import compile_c
from shop import MeasuredShop

ROOT = Path(__file__).resolve().parent.parent
SCOPE_EBPF = Path(sys.executable).with_name("scope-ebpf")
VERSION_COMMANDS = {
    "perf": ["perf", "--version"],
    "bpftrace": ["bpftrace", "--version"],
    "strace": ["strace", "--version"],
    "BCC": [sys.executable, "-c", "import bcc; print(bcc.__version__)"],
}


@dataclass
class Setting:
    """What every measurement needs. What it starts lives as long as `stack`."""

    directory: Path
    stack: ExitStack
    quick: bool
    tools: dict[str, str | None] = field(default_factory=dict)
    _shop: MeasuredShop | None = None

    def __post_init__(self) -> None:
        """Look for the tools."""
        self.tools.update(find_tools())

    @cached_property
    def target_cpu(self) -> int:
        """The CPU for the synthetic target."""
        return max(os.sched_getaffinity(0))

    @cached_property
    def other_cpus(self) -> set[int]:
        """The CPUs for whoever watches it; the same one where there is no other."""
        return os.sched_getaffinity(0) - {self.target_cpu} or {self.target_cpu}

    @cached_property
    def getppid_program(self) -> Path:
        """The compiled synthetic target."""
        return compile_c(SOURCE, self.directory)

    def getppid(self, cpu: int | None = None) -> Getppid:
        """A synthetic target, to be used as a context manager."""
        return Getppid(self.getppid_program, self.target_cpu if cpu is None else cpu)

    def shop(self) -> MeasuredShop:
        """The shop, warm; started at the first use and kept until the end of the run."""
        if self._shop is None:
            self.say("starting the shop")
            self._shop = self.stack.enter_context(MeasuredShop())
            self._shop.load(200 if self.quick else 2000)
        return self._shop

    def path(self, name: str) -> Path:
        """A path in the temporary directory that does not exist."""
        path = self.directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return path

    @staticmethod
    def say(text: str) -> None:
        """Tell on stderr what goes on."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def find_tools() -> dict[str, str | None]:
    """The version of each alternative; None for one that is missing."""
    found: dict[str, str | None] = {}
    for name, command in VERSION_COMMANDS.items():
        found[name] = None
        if shutil.which(command[0]):
            ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            if ran.returncode == 0 and ran.stdout.strip():
                found[name] = ran.stdout.split("\n")[0].split()[-1].removeprefix("v")
    return found


def describe_machine(setting: Setting) -> dict[str, Any]:
    """What a reader of the numbers needs to know of this machine."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        os.uname().machine,
    )
    disk = os.stat(setting.directory).st_dev
    return {
        "processor": processor,
        "cpus": os.cpu_count(),
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        "python": sys.version.split()[0],
        "temporary_directory": str(setting.directory),
        "file_system": file_system(disk),
        "tools": setting.tools,
    }


def file_system(device: int) -> str:
    """The type of the mounted file system with this device number."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0]
    return "unknown"
