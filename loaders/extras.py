"""Extra programs that see messages outside of a message's system call: those through io_uring.

What they see and miss is told in probes/sockets.h. How they reach the kernel's functions is chosen by trying,
with programs that do nothing (probes/trial.bpf.c): fentry and fexit see most; tracepoints are cheaper, but
see sockets only, and no bytes; kprobes come last, since their returns are missed where many calls wait.

Almost nobody uses io_uring, and each read and write on a socket or pipe of the host would pay for it. So the
programs are attached when a recorded process is seen to have an io_uring. They are loaded then, too, or
before the privilege for that is given up, but after all the others are at work: by themselves, so that a
kernel that refuses them refuses nothing else, and no event waits for them.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders import privileges
from scope_ebpf.loaders.kernel import (
    forget_kernel_types,
    has_struct,
    kernel_types,
    tracepoint_arguments,
)
from scope_ebpf.loaders.libbpf import BpfObject
from scope_ebpf.loaders.shared_globals import SharedGlobals

# How the sentence for a recording begins.
SEEN, NOT_SEEN = "messages through io_uring: seen by", "messages through io_uring: not seen"
SETTING = Path("/proc/sys/kernel/io_uring_disabled")
TRIAL_OBJECT = Path(__file__).resolve().parent.parent / "probes" / "trial.bpf.o"

# The kernel's functions that every way to a socket or pipe leads through, and the kprobes for each kind.
SEND = ("on_socket_send", "on_socket_return")
RECEIVE = ("on_socket_receive", "on_socket_return")
WRITE = ("on_pipe_write", "on_pipe_return")
READ = ("on_pipe_read", "on_pipe_return")
CONNECT = ("on_connect", "on_connect_return")
FUNCTIONS = {
    "inet_sendmsg": SEND,
    "inet6_sendmsg": SEND,
    "unix_stream_sendmsg": SEND,
    "unix_dgram_sendmsg": SEND,
    "inet_recvmsg": RECEIVE,
    "inet6_recvmsg": RECEIVE,
    "unix_stream_recvmsg": RECEIVE,
    "unix_dgram_recvmsg": RECEIVE,
    "pipe_write": WRITE,
    "pipe_read": READ,
    "__sys_connect_file": CONNECT,
    # since 6.15
    "anon_pipe_write": WRITE,
    "anon_pipe_read": READ,
}
TRACEPOINT_PROGRAMS = ("on_sock_sent", "on_sock_received")
# Of functions that may be in a module, which is not looked into.
FAMILIES = {"inet6_sendmsg": "IPv6", "unix_stream_sendmsg": "Unix sockets"}
TRANSFERS = 4096  # at once
# The way from struct io_worker to whose work it does (employer_path in probes/sockets.h).
EMPLOYER_PATHS = (
    (("io_worker", "wq"), ("io_wq", "task")),
    # before 6.4 (commit dfd63baf892c) there was a struct per node between them
    (("io_worker", "wqe"), ("io_wqe", "wq"), ("io_wq", "task")),
)


@dataclass(frozen=True)
class Way:
    """How the functions are reached.

    Attributes:
        name: as users read it: fexit, kprobes, tracepoints; empty: not at all.
        functions: of the kernel, that are probed.
        refusals: what was tried before, and why it does not work.
    """

    name: str
    functions: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs to load, in the order in which they are attached: no begin without its end."""
        if self.name == "fexit":
            return (
                *(f"end_{name}" for name in self.functions),
                *(f"begin_{name}" for name in self.functions),
            )
        if self.name == "kprobes":
            pairs = [FUNCTIONS[name] for name in self.functions]
            return tuple(
                dict.fromkeys([*(end for _, end in pairs), *(begin for begin, _ in pairs)])
            )
        return TRACEPOINT_PROGRAMS if self.name else ()

    def attach(self, loaded: BpfObject) -> None:
        """Attach the programs of a loaded object.

        Raises:
            LoadError: with the kernel's reason; none of them is attached then.
        """
        try:
            if self.name == "kprobes":
                for at_return in (True, False):
                    for function in self.functions:
                        program = FUNCTIONS[function][at_return]
                        loaded.attach_kprobe(program, function, at_return=at_return)
            else:
                loaded.attach(*self.programs)
        except LoadError:
            loaded.detach_all(self.programs)
            raise

    @property
    def reasons(self) -> str:
        """Why not more is seen; empty: nothing was refused."""
        return "; ".join(self.refusals)

    @property
    def seen(self) -> str:
        """By what messages are seen, and what is not."""
        absent = [
            family
            for function, family in FAMILIES.items()
            if self.functions and function not in self.functions
        ]
        limits = f", without {' and '.join(absent)}, which this kernel has in modules" * bool(
            absent
        )
        limits += {
            "tracepoints": ", without connects, pipes and payload heads",
            "kprobes": "; where many calls wait some are missed, and counted as lost",
        }.get(self.name, "")
        return f"{self.name}{limits}"

    def told(self) -> str:
        """A sentence about what is seen, and why not more."""
        if not self.name:
            return f"{NOT_SEEN}: {self.reasons or 'nothing was tried'}"
        because = f" ({self.reasons})" if self.refusals else ""
        return f"{SEEN} {self.seen}{because}"


def choose() -> Way:
    """Try the ways one after the other; never raises."""
    refusals: list[str] = []
    for name, try_it in WAYS.items():
        try:
            functions = try_it()
        except LoadError as error:
            # fact, cause and next step: the cause is what explains it
            cause = re.split(r"; | \(", str(error).partition(": ")[2] or str(error))[0]
            refusals.append(f"{name}: {cause}")
        else:
            return Way(name, functions, tuple(refusals))
    return Way("", (), tuple(refusals))


def _functions() -> tuple[str, ...]:
    functions = tuple(name for name in FUNCTIONS if kernel_types().has_function(name))
    if not functions:
        raise LoadError("cannot probe sockets: the kernel's type information names none of them")
    return functions


def _try_fexit() -> tuple[str, ...]:
    functions = _functions()
    _try("try_fentry", "try_fexit")
    return functions


def _try_kprobes() -> tuple[str, ...]:
    functions = _functions()
    _try("try_kprobe", "try_kretprobe")
    return functions


def _try_tracepoints() -> tuple[str, ...]:
    if not tracepoint_arguments("sock_send_length"):
        raise LoadError("cannot probe sockets: this kernel does not have them")
    _try("try_tracepoint")
    return ()


def _try(*programs: str) -> None:
    with BpfObject(TRIAL_OBJECT) as trial:
        trial.select(set(programs))
        trial.load()
        trial.attach(*programs)


WAYS: dict[str, Callable[[], tuple[str, ...]]] = {
    "fexit": _try_fexit,
    "tracepoints": _try_tracepoints,
    "kprobes": _try_kprobes,
}


def why_unused() -> str:
    """Why no process can make an io_uring on this host; empty if one can."""
    if not has_struct("io_ring_ctx"):
        return "this kernel has no io_uring"
    try:
        setting = SETTING.read_text().strip()
    except OSError:
        return ""  # before 6.6 it was for everybody
    return "kernel.io_uring_disabled is 2" if setting == "2" else ""


def employer_path() -> int:
    """How this kernel gets from a worker to whose work it does, as in probes/sockets.h; 0: not known."""
    for path in EMPLOYER_PATHS:
        offsets = [kernel_types().offset(*step) for step in path]
        known = [offset for offset in offsets if offset is not None]
        if len(known) == len(path):
            return sum(offset << 16 * step for step, offset in enumerate(known))
    return 0


class RingWatch:
    """The extra programs of one capture: loaded beside its others, and attached once there is an io_uring."""

    def __init__(
        self, capture: BpfObject, shared: SharedGlobals, cpus: int, payload_bytes: int
    ) -> None:
        """Nothing is loaded yet.

        Args:
            capture: the capture's object, loaded; its maps are used.
            shared: its variables.
            cpus: how many this host can have.
            payload_bytes: of a payload head at most.
        """
        self._capture = capture
        self._sizes = {
            "transfers": (TRANSFERS, None),
            "pieced_heads": (cpus, 8 + max(2 * payload_bytes, 64)),
        }
        self._loaded: BpfObject | None = None
        self._way: Way | None = None
        self._asked = False
        self._met, self._wanted = shared["rings_met"], shared["transfers_wanted"]
        self._since, self._path = shared["transfers_since"], shared["employer_path"]

    def prepare(self) -> None:
        """Load the programs, if a process may come to use io_uring; never raises.

        What is refused is told by watch(), if there is an io_uring.
        """
        if self._way is not None:
            return
        reason = why_unused()
        if reason:
            self._way = Way("", refusals=(f"{reason} when the recording began",))
        else:
            self._load()

    def watch(self, *, from_the_start: bool = False) -> list[str]:
        """Attach the programs once a recorded thread is seen to have an io_uring.

        Args:
            from_the_start: nothing has been counted yet that may have moved before.

        Returns:
            A sentence for the recording about what is seen of them from now on; else nothing.
        """
        if self._asked or not self._met[0]:
            return []
        self._asked = True
        if self._way is None:
            self._load()
        way, loaded = self._way or Way(""), self._loaded
        if loaded is None:
            return [way.told()]
        try:
            way.attach(loaded)
        except LoadError as error:
            reason = str(error)
            if way.name == "kprobes" and privileges.missing(
                privileges.current().effective, ("CAP_PERFMON",)
            ):
                reason = (
                    "kprobes need CAP_PERFMON to be attached, and that was given up before there was one;"
                    " start the recording when the program has its io_uring"
                )
            return [f"{NOT_SEEN}: {reason}"]
        self._since[0] = 0 if from_the_start else time.monotonic_ns()
        self._wanted[0] = 1
        return [way.told()]

    def _load(self) -> None:
        way = choose()
        if way.name:
            loaded = BpfObject(self._capture.path)
            try:
                loaded.select(set(way.programs))
                loaded.share_maps(self._capture, *self._sizes)
                for name, (entries, value_bytes) in self._sizes.items():
                    loaded.resize(name, entries, value_bytes)
                loaded.load()
            except LoadError as error:
                loaded.close()
                way = Way("", refusals=(*way.refusals, f"{way.name}: {error}"))
            else:
                self._loaded = loaded
                self._path[0] = employer_path()
        self._way = way
        forget_kernel_types()

    def stop(self) -> None:
        """Nothing more is to be told; the programs stay attached until close()."""
        self._wanted[0] = 0

    def close(self) -> None:
        """Detach and unload; may be called again."""
        if self._loaded is not None:
            self._loaded.close()
