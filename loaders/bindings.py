"""libbpf's functions by ctypes, and bpf(2) for what it does not offer.

Functions and their meaning: https://libbpf.readthedocs.io (1.0 and later; 1.1.2 is Debian 12's).
"""

import ctypes as c
import errno
import os
import threading

from scope_ebpf.errors import LoadError

LOG_LINES = 400
LIBBPF_DEBUG = 2  # enum libbpf_print_level
LOG_BYTES = 1 << 20  # libbpf hands over the whole log of the verifier at once
PRINT_CALLBACK = c.CFUNCTYPE(c.c_int, c.c_int, c.c_char_p, c.c_void_p)
# The number of bpf(2).
BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}


class Library:
    """The functions of libbpf.so that are used, with their types."""

    def __init__(self) -> None:
        """Load it.

        Raises:
            LoadError: it is not installed or too old.
        """
        self.log: list[str] = []
        try:
            lib = c.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise LoadError(
                "cannot load libbpf.so.1: it is not installed;"
                " run `sudo apt install libbpf1` (libbpf 1.0 or later is needed)"
            ) from error
        self._libc = c.CDLL(None)
        pointer, text, number, size = c.c_void_p, c.c_char_p, c.c_int, c.c_size_t

        def function(name: str, result: object, *arguments: object) -> "c._NamedFuncPointer":
            try:
                entry = getattr(lib, name)
            except AttributeError as error:
                raise LoadError(
                    f"cannot use libbpf.so.1: it has no {name}; install libbpf 1.0 or later"
                ) from error
            entry.restype, entry.argtypes = result, arguments
            return entry  # type: ignore[no-any-return]

        self.set_print = function("libbpf_set_print", pointer, PRINT_CALLBACK)
        self.version = function("libbpf_version_string", text)
        self.open_file = function("bpf_object__open_file", pointer, text, pointer)
        self.load = function("bpf_object__load", number, pointer)
        self.next_btf = function("bpf_btf_get_next_id", number, c.c_uint32, pointer)
        self.close = function("bpf_object__close", None, pointer)
        self.next_program = function("bpf_object__next_program", pointer, pointer, pointer)
        self.program_name = function("bpf_program__name", text, pointer)
        self.set_autoload = function("bpf_program__set_autoload", number, pointer, c.c_bool)
        self.expect_attach_type = function(
            "bpf_program__set_expected_attach_type", number, pointer, number
        )
        self.set_attach_target = function(
            "bpf_program__set_attach_target", number, pointer, number, text
        )
        self.program_fd = function("bpf_program__fd", number, pointer)
        self.object_info = function("bpf_obj_get_info_by_fd", number, number, pointer, pointer)
        self.find_program = function("bpf_object__find_program_by_name", pointer, pointer, text)
        self.attach = function("bpf_program__attach", pointer, pointer)
        self.attach_uprobe = function(
            "bpf_program__attach_uprobe_opts", pointer, pointer, number, text, size, pointer
        )
        self.attach_kprobe = function(
            "bpf_program__attach_kprobe", pointer, pointer, c.c_bool, text
        )
        self.attach_perf_event = function(
            "bpf_program__attach_perf_event", pointer, pointer, number
        )
        self.link_destroy = function("bpf_link__destroy", number, pointer)
        self.link_fd = function("bpf_link__fd", number, pointer)
        self.iterate = function("bpf_iter_create", number, number)
        self.find_map = function("bpf_object__find_map_by_name", pointer, pointer, text)
        self.next_map = function("bpf_object__next_map", pointer, pointer, pointer)
        self.map_name = function("bpf_map__name", text, pointer)
        self.map_fd = function("bpf_map__fd", number, pointer)
        self.reuse_map = function("bpf_map__reuse_fd", number, pointer, number)
        self.set_max_entries = function("bpf_map__set_max_entries", number, pointer, c.c_uint32)
        self.set_value_size = function("bpf_map__set_value_size", number, pointer, c.c_uint32)
        self.initial_value = function("bpf_map__initial_value", pointer, pointer, c.POINTER(size))
        self.map_update = function(
            "bpf_map_update_elem", number, number, pointer, pointer, c.c_uint64
        )
        self.map_next_key = function("bpf_map_get_next_key", number, number, pointer, pointer)
        self.map_lookup = function("bpf_map_lookup_elem", number, number, pointer, pointer)
        self.kernel_btf = function("btf__load_vmlinux_btf", pointer)
        self.btf_free = function("btf__free", None, pointer)
        self.btf_find = function("btf__find_by_name_kind", number, pointer, text, c.c_uint32)
        self.btf_type = function("btf__type_by_id", pointer, pointer, c.c_uint32)
        self.btf_name = function("btf__name_by_offset", text, pointer, c.c_uint32)
        self._callback = PRINT_CALLBACK(self._print)
        self.set_print(self._callback)

    def _print(self, level: int, template: bytes, arguments: int) -> int:
        if level == LIBBPF_DEBUG:
            return 0  # thousands of lines per object; what explains a failure is a warning
        buffer = c.create_string_buffer(LOG_BYTES)
        self._libc.vsnprintf(
            buffer, c.c_size_t(LOG_BYTES), c.c_char_p(template), c.c_void_p(arguments)
        )
        self.log += buffer.value.decode(errors="replace").splitlines()
        del self.log[:-LOG_LINES]
        return 0


_library: Library | None = None
_library_lock = threading.Lock()


def library() -> Library:
    """libbpf, loaded at the first use.

    Raises:
        LoadError: it is not installed or too old.
    """
    global _library  # noqa: PLW0603 - one process, one libbpf
    with _library_lock:
        if _library is None:
            _library = Library()
        return _library


def bpf(command: int, attributes: "c.Array[c.c_char]") -> int:
    """bpf(2), for what libbpf does not offer: its result, or -errno."""
    number = BPF_SYSCALL.get(os.uname().machine)
    if number is None:
        return -errno.ENOSYS
    call = c.CDLL(None, use_errno=True).syscall
    call.restype, call.argtypes = c.c_long, [c.c_long, c.c_int, c.c_void_p, c.c_uint]
    result = int(call(number, command, attributes, len(attributes)))
    return result if result >= 0 else -c.get_errno()
