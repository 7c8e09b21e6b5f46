"""Records a process with rings that are too small: tiny_recorder.py PID DIRECTORY."""

from __future__ import annotations

import sys
from pathlib import Path

from scope_ebpf.loaders.capture import CaptureOptions
from scope_ebpf.loaders.targets import find_target
from scope_ebpf.recorder import Plan, Recorder


def main() -> None:
    pid, path = int(sys.argv[1]), Path(sys.argv[2])
    path.mkdir(mode=0o700)
    options = CaptureOptions(tgids=(pid,), hot_slots=1024, wide_slots=256)
    plan = Plan(path, options, (find_target(pid),), tuple(sys.argv))

    def attached() -> None:
        print(f"recording {pid} to {path}", file=sys.stderr, flush=True)

    Recorder(plan, on_attached=attached).run()


if __name__ == "__main__":
    main()
