"""Which loader brings the probes into this kernel; apart from the loaders, which take long to import."""

import os
from pathlib import Path

from scope_ebpf.errors import LoadError

KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")


def choose_loader(wanted: str) -> str:
    """The loader for `auto`: bcc where only that can work, else libbpf, whose error says what is missing."""
    if wanted != "auto":
        return wanted
    if KERNEL_BTF.exists():
        return "libbpf"
    from scope_ebpf.loaders import bcc

    if bcc.headers() is None:
        return "libbpf"
    try:
        bcc.check_kernel(os.uname().release)
        bcc.find_bcc()
    except LoadError:
        return "libbpf"
    return "bcc"
