"""The families of probes, by the table that each fills; apart from the rest so that help needs no numpy."""

FAMILIES = ("processes", "syscalls", "messages", "tls", "offcpu", "samples", "contexts", "gil")
# Those that --loader bcc has.
BCC_FAMILIES = ("processes", "syscalls", "messages", "offcpu")
# Those that are recorded only when asked for: all fill the table hits.
EXTRA_FAMILIES = ("postgres", "runtime")
# The tables of every recording: those of recording.schema, which would import polars for --help.
TABLES = (
    "processes",
    "syscalls",
    "messages",
    "connections",
    "connects",
    "tls",
    "offcpu",
    "interpreters",
    "samples",
    "stacks",
    "codes",
    "contexts",
    "flows",
    "handoffs",
    "gil",
    "hits",
    "losses",
)
