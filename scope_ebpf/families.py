"""The families of probes, by the table that each fills; apart from the rest so that help needs no numpy."""

FAMILIES = ("processes", "syscalls", "messages", "tls", "offcpu", "samples", "contexts", "gil")
