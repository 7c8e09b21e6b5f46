"""Extra programs that see messages outside of a message's system call: those through io_uring.

What they see and miss is told in probes/sockets.h. How they reach the kernel's functions is chosen by trying,
with programs that do nothing (probes/trial.bpf.c): fentry and fexit see most; tracepoints are cheaper, but
see sockets only, and no bytes; kprobes come last, since their returns are missed where many calls wait.

Almost nobody uses io_uring, and each read and write on a socket or pipe of the host would pay for it. So the
programs are loaded with all the others, while there is the privilege for that, but attached when a recorded
process is seen to have an io_uring.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders.libbpf import BpfObject, kernel_functions

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

    def told(self) -> str:
        """A sentence about what is seen, and why not more."""
        reasons = "; ".join(self.refusals) or "nothing was tried"
        if not self.name:
            return f"messages through io_uring: not seen: {reasons}"
        because = f" ({reasons})" if self.refusals else ""
        limits = {
            "tracepoints": ", without connects, pipes and payload heads",
            "kprobes": "; where many calls wait some are missed, and counted as lost",
        }.get(self.name, "")
        return f"messages through io_uring: seen by {self.name}{limits}{because}"


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


def _try_fexit() -> tuple[str, ...]:
    functions = kernel_functions(FUNCTIONS)
    if not functions:
        raise LoadError("cannot probe sockets: the kernel's type information names none of them")
    _try("try_fentry", "try_fexit")
    return functions


def _try_kprobes() -> tuple[str, ...]:
    functions = kernel_functions(FUNCTIONS)
    if not functions:
        raise LoadError("cannot probe sockets: the kernel's type information names none of them")
    _try("try_kprobe", "try_kretprobe")
    return functions


def _try_tracepoints() -> tuple[str, ...]:
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
