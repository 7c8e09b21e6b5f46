"""Reading Python objects of another process, while it goes on.

Nothing that comes from there is trusted: sizes have limits, pointers are checked, and what does not make
sense raises `Unreadable` instead of a guess. What was read may still be of two moments.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from scope_ebpf.cpython import object_offsets as known
from scope_ebpf.cpython.offsets import Layout
from scope_ebpf.loaders.python.memory import AddressError, ProcessMemory
from scope_ebpf.loaders.python.states import dict_entries

# Names of types in C are those of attributes, with modules before them.
_TYPE_NAME = re.compile(rb"[A-Za-z_\x80-\xff<][\w.\x80-\xff<>\[\]]*\Z")
_MOST_CHARACTERS = 1 << 16
_MOST_BYTES = 1 << 20
_MOST_ITEMS = 1 << 21  # words in one read: 16 MiB
_MOST_DIGITS = 64
_MOST_BASES = 64
_DIGIT_BITS = 30
_KINDS = {1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}

Value = object


class Unreadable(Exception):  # noqa: N818 - it tells of what is there, not of an error here
    """What stands at an address is not what was expected; the process has changed it, or has gone."""


class Objects:
    """The objects of one process."""

    def __init__(self, memory: ProcessMemory, layout: Layout) -> None:
        """Nothing is read yet; names of types are kept, since types seldom go."""
        self._memory = memory
        self.layout = layout
        self._type_names: dict[int, str] = {}

    def bytes_at(self, address: int, size: int) -> bytes:
        """So many bytes.

        Raises:
            Unreadable: they are not all there; the other methods raise it, too.
            ProcessGoneError: the process ended, or executed another program.
        """
        try:
            return self._memory.read(address, size)
        except AddressError as error:
            raise Unreadable(str(error)) from error

    def word(self, address: int) -> int:
        """An unsigned number of 8 bytes."""
        return int.from_bytes(self.bytes_at(address, 8), "little")

    def number(self, address: int, size: int = 8) -> int:
        """A signed number."""
        return int.from_bytes(self.bytes_at(address, size), "little", signed=True)

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """Several words in one read."""
        if not 0 <= count <= _MOST_ITEMS:
            raise Unreadable(f"{count} items at {address:#x}")
        return struct.unpack(f"<{count}Q", self.bytes_at(address, 8 * count)) if count else ()

    def type_of(self, address: int) -> int:
        """The address of an object's type."""
        return self.word(_aligned(address) + self.layout.object_type)

    def type_name(self, address: int) -> str:
        """The name of an object's type as type.__name__ has it: without a module.

        Raises:
            Unreadable: there is no object.
        """
        return self.full_type_name(address).rpartition(".")[2]

    def full_type_name(self, address: int) -> str:
        """The name in tp_name, where types of extension modules have their module before it."""
        kind = self.type_of(address)
        if kind not in self._type_names:
            # the type of a type is a type: garbage hardly passes
            flags = self.word(self.type_of(kind) + self.layout.type_flags)
            if not flags & known.FLAG_TYPE:
                raise Unreadable(f"no type at {kind:#x}")
            pointer = self.word(kind + self.layout.type_name)
            name = self._c_string(pointer)
            if not _TYPE_NAME.match(name):
                raise Unreadable(f"no type at {kind:#x}")
            self._type_names[kind] = name.decode(errors="backslashreplace")
        return self._type_names[kind]

    def _c_string(self, address: int) -> bytes:
        try:
            return self._memory.string(address)
        except AddressError as error:
            raise Unreadable(str(error)) from error

    def flags(self, address: int) -> int:
        """The flags of an object's type; the object's type is checked to be one."""
        self.full_type_name(address)
        return self.word(self.type_of(address) + self.layout.type_flags)

    def text(self, address: int, limit: int = _MOST_CHARACTERS) -> str:
        """A str, its first `limit` characters; lone surrogates and garbage are escaped."""
        if not self.flags(address) & known.FLAG_STR:
            raise Unreadable(f"no str at {address:#x}")
        layout = self.layout
        length = self.number(address + layout.unicode_length)
        state = self.number(address + layout.unicode_state, 1) >> layout.unicode_kind_shift
        width, compact, ascii_only = state & 7, state >> 3 & 1, state >> 4 & 1
        if width not in _KINDS or not 0 <= length < 1 << 40:
            raise Unreadable(f"no str at {address:#x}")
        if compact:
            data = address + (layout.unicode_ascii if ascii_only else layout.unicode_compact)
        else:  # a subclass's: the characters are elsewhere
            data = self.word(address + layout.unicode_data)
        count = min(length, limit, _MOST_CHARACTERS)
        if not count:
            return ""
        return _decoded(self.bytes_at(data, count * width), width)

    def integer(self, address: int) -> int:
        """An int, or a bool as one."""
        if not self.flags(address) & known.FLAG_INT:
            raise Unreadable(f"no int at {address:#x}")
        layout = self.layout
        size = self.number(address + (layout.int_size or layout.int_tag or 0))
        if layout.int_tag is not None:
            sign, count = (1, 0, -1, 0)[size & 3], size >> 3
        else:
            sign, count = (size > 0) - (size < 0), abs(size)
        if not 0 <= count <= _MOST_DIGITS:
            raise Unreadable(f"an int of {count} digits at {address:#x}")
        if not sign or not count:
            return 0
        digits = struct.unpack(f"<{count}I", self.bytes_at(address + layout.int_digits, 4 * count))
        if any(digit >> _DIGIT_BITS for digit in digits):
            raise Unreadable(f"no int at {address:#x}")
        return sign * int(sum(digit << _DIGIT_BITS * at for at, digit in enumerate(digits)))

    def value(self, address: int) -> Value:
        """A str, bytes, int, bool, float or None; bytes are cut at 1 MiB.

        Raises:
            Unreadable: it is something else.
        """
        flags, name = self.flags(address), self.full_type_name(address)
        if flags & known.FLAG_STR:
            return self.text(address)
        if flags & known.FLAG_INT:
            number = self.integer(address)
            return bool(number) if name == "bool" else number
        if flags & known.FLAG_BYTES:
            return self.data(address)
        if name == "float":
            (real,) = struct.unpack("<d", self.bytes_at(address + self.layout.float_value, 8))
            return float(real)
        if name == "NoneType":
            return None
        raise Unreadable(f"a {name} at {address:#x}")

    def data(self, address: int, limit: int = _MOST_BYTES) -> bytes:
        """The contents of a bytes object, its first `limit` bytes."""
        if not self.flags(address) & known.FLAG_BYTES:
            raise Unreadable(f"no bytes at {address:#x}")
        count = self.number(address + self.layout.bytes_size)
        if not 0 <= count < 1 << 40:
            raise Unreadable(f"no bytes at {address:#x}")
        count = min(count, limit, _MOST_BYTES)
        return self.bytes_at(address + self.layout.bytes_data, count) if count else b""

    def items(self, address: int) -> tuple[int, ...]:
        """The addresses of what a tuple, list or set holds, at most a million."""
        flags = self.flags(address)
        if flags & known.FLAG_TUPLE:
            count = self._count(address + self.layout.object_size)
            return self.words(address + self.layout.tuple_items, count)
        if flags & known.FLAG_LIST:
            count = self._count(address + self.layout.object_size)
            return self.words(self.word(address + self.layout.list_items), count) if count else ()
        if self.full_type_name(address) in ("set", "frozenset"):
            return self._set_items(address)
        raise Unreadable(f"no container at {address:#x}")

    def _set_items(self, address: int) -> tuple[int, ...]:
        used = self._count(address + self.layout.set_used)
        size = self._count(address + self.layout.set_mask) + 1
        if used > size or size & (size - 1):
            raise Unreadable(f"no set at {address:#x}")
        entries = self.words(self.word(address + self.layout.set_table), 2 * size)
        # free entries have no key; those of removed ones a dummy, and -1 for its hash
        return tuple(
            key
            for key, code in zip(entries[::2], entries[1::2], strict=True)
            if key and code != 2**64 - 1
        )

    def _count(self, address: int) -> int:
        count = self.number(address)
        if not 0 <= count <= _MOST_ITEMS // 2:
            raise Unreadable(f"{count} items")
        return count

    def pairs(self, address: int) -> Iterator[tuple[int, int]]:
        """The addresses of a dict's keys and values, in its order."""
        if not self.flags(address) & known.FLAG_DICT:
            raise Unreadable(f"no dict at {address:#x}")
        keys = self.word(address + self.layout.dict_keys)
        values = self.word(address + self.layout.dict_values)
        yield from self._pairs(keys, values)

    def _pairs(self, keys: int, values: int) -> Iterator[tuple[int, int]]:
        try:
            place, count, width = dict_entries(self._memory, self.layout, keys)
        except AddressError as error:
            raise Unreadable(str(error)) from error
        words = self.words(place, count * width)
        held = words[width - 1 :: width]
        if values:
            held = self.words(values + self.layout.values_items, count)
        for key, value in zip(words[width - 2 :: width], held, strict=True):
            if key and value:  # deleted, or an attribute that this instance does not have
                yield key, value

    def lookup(self, address: int, name: str) -> int:
        """What a dict has for a key that is a str."""
        for key, value in self.pairs(address):
            if self._is(key, name):
                return value
        raise Unreadable(f"no key {name} in the dict at {address:#x}")

    def _is(self, address: int, name: str) -> bool:
        try:
            return self.text(address, len(name) + 1) == name
        except Unreadable:
            return False

    def attribute(self, address: int, name: str) -> int:
        """What an instance's dict has for a name; slots and properties are not looked at."""
        kind, flags = self.type_of(address), self.flags(address)
        if not flags & known.FLAG_MANAGED_DICT:
            return self.lookup(self._instance_dict(address, kind), name)
        layout = self.layout
        values, instance_dict = 0, self.word(address + (layout.object_managed_dict or 0))
        if layout.object_managed_values is not None:
            values = self.word(address + layout.object_managed_values)
        elif layout.version < (3, 13) and instance_dict & 1:  # tagged: values, less one
            values, instance_dict = instance_dict + 1, 0
        elif layout.version >= (3, 13) and flags & known.FLAG_INLINE_VALUES:
            values = address + self.word(kind + self.layout.type_basicsize)
        if instance_dict:
            return self.lookup(instance_dict, name)
        if not values or not flags & known.FLAG_HEAP_TYPE:
            raise Unreadable(f"no attributes at {address:#x}")
        keys = self.word(kind + layout.heap_type_cached_keys)
        for key, value in self._pairs(keys, values):
            if self._is(key, name):
                return value
        raise Unreadable(f"no attribute {name} at {address:#x}")

    def _instance_dict(self, address: int, kind: int) -> int:
        offset = self.number(kind + self.layout.type_dictoffset)
        if not 0 < offset < 1 << 16:
            raise Unreadable(f"no attributes at {address:#x}")
        return self.word(address + offset)

    def referent(self, address: int) -> int:
        """What a weak reference refers to; one that is dead refers to None."""
        if not self._has_base(address, "ReferenceType", "weakref"):
            raise Unreadable(f"no weak reference at {address:#x}")
        return self.word(address + self.layout.weakref_object)

    def _has_base(self, address: int, *names: str) -> bool:
        return any(name.rpartition(".")[2] in names for name in self.base_names(address))

    def base_names(self, address: int) -> Iterator[str]:
        """The names of an object's type and of the types that it is made of (tp_base)."""
        yield self.full_type_name(address)
        kind = self.word(self.type_of(address) + self.layout.type_base)
        for _ in range(_MOST_BASES):
            if not kind:
                return
            name = self._c_string(self.word(kind + self.layout.type_name))
            yield name.decode(errors="backslashreplace")
            kind = self.word(kind + self.layout.type_base)


def _decoded(characters: bytes, width: int) -> str:
    try:
        text = characters.decode(_KINDS[width], "surrogatepass" if width > 1 else "strict")
    except UnicodeDecodeError as error:
        raise Unreadable("no characters") from error
    return text.encode("utf-8", "backslashreplace").decode()


def _aligned(address: int) -> int:
    if not 0x1000 <= address < 1 << 63 or address % 8:
        raise Unreadable(f"no object at {address:#x}")
    return address
