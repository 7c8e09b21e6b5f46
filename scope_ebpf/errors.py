"""Errors that the user sees: each message is one sentence of fact, cause and next step."""


class ScopeError(Exception):
    """Something failed for a reason that the message tells; the command line exits with exit_code.

    `said` are lines of another program, such as a compiler, that are shown below the message.
    """

    exit_code = 1
    said: tuple[str, ...] = ()


class LoadError(ScopeError):
    """A BPF object, program or map could not be loaded or attached."""


class TargetError(ScopeError):
    """A target process or cgroup is not there or may not be traced."""


class RecordingError(ScopeError):
    """A recording cannot be written, or what is there cannot be read."""


class FormatError(ScopeError):
    """A file does not have the format that it should have: BTF, ELF, meta.json, /proc."""


class UsageError(ScopeError):
    """The request itself makes no sense."""

    exit_code = 2
