"""Probes that users chose: from what they ask for to places in files, and to what probes/hits.h reads there.

Each place has a number, which its uprobe carries as a cookie: the element of `hit_probes` and the first of
its HIT_ARGUMENTS elements of `hit_arguments`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scope_ebpf.errors import LoadError, UsageError
from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.probed_files import ProbedFile
from scope_ebpf.loaders.ring import Records
from scope_ebpf.loaders.uprobe_sites import choose_site, is_emulated
from scope_ebpf.loaders.usdt import (
    FUNCTION_ARGUMENTS,
    FUNCTION_RESULT,
    REGISTERS,
    Operand,
    UsdtSite,
    read_sites,
)
from scope_ebpf.probe_specs import ArgumentType, ProbeSpec, did_you_mean
from scope_ebpf.records import (
    HIT_ARGUMENT,
    HIT_PROBE,
    HitFlags,
    HitLimits,
    HitSource,
    PythonLimits,
)

PROGRAM = "on_hit"
SOURCES = {
    "nowhere": HitSource.HIT_NOWHERE,
    "constant": HitSource.HIT_CONSTANT,
    "register": HitSource.HIT_REGISTER,
    "memory": HitSource.HIT_MEMORY,
}
# How many bytes each of so many texts may have; together HIT_TEXT_BYTES.
TEXT_BYTES = {1: (320,), 2: (216, 104), 3: (112, 104, 104), 4: (80, 80, 80, 80)}
STACK_SLOT = 8


@dataclass(frozen=True)
class Argument:
    """An argument of a place: where it is, and what it means.

    Attributes:
        type: how it is shown.
        operand: where it is; None: the begin of the pair left it.
        carried: which of those that the begin left.
    """

    type: ArgumentType
    operand: Operand | None
    carried: int = 0


@dataclass(frozen=True)
class Place:
    """Where a uprobe goes.

    Attributes:
        label: the probe's name in the table of hits.
        path: the file.
        offset: in the file.
        semaphore: offset of the counter that tells the program that somebody listens; 0: there is none.
        arguments: what is read there.
        role: what a hit does.
        pair: those with the same number are begin and end; 0: it is no pair.
        at_return: when the function there returns.
        description: what was chosen, for meta.json; empty where another place says it.
    """

    label: str
    path: Path
    offset: int
    semaphore: int = 0
    arguments: tuple[Argument, ...] = ()
    role: HitFlags = HitFlags.HIT_ROW
    pair: int = 0
    at_return: bool = False
    description: str = ""


@dataclass(frozen=True)
class HitKind:
    """What a hit's number stands for: the probe's name, and how its arguments are shown."""

    label: str
    types: tuple[ArgumentType, ...]


@dataclass(frozen=True)
class Pair:
    """Two USDT probes of which one begins what the other one ends.

    Attributes:
        label: name of the row that tells of both.
        begin, end: the probes' names.
        types: of the end's arguments; None: as the notes say.
        carried: types of the begin's first arguments that stand before those of the end.
        nests: whether one may begin within another: then both are in one function.
        begin_types: types of a row of its own for the begin; None: there is none.
    """

    label: str
    begin: str
    end: str
    types: tuple[ArgumentType, ...] | None = None
    carried: tuple[ArgumentType, ...] = ()
    nests: bool = False
    begin_types: tuple[ArgumentType, ...] | None = None


@dataclass
class Places:
    """All places of a recording; the number of one is its position.

    Attributes:
        places: in the order in which they were asked for.
        notes: sentences about what they cost.
    """

    places: list[Place] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _pairs: int = 0

    def new_pair(self) -> int:
        """A number for a pair."""
        self._pairs += 1
        return self._pairs

    def add(self, places: Iterable[Place]) -> None:
        """Take some more.

        Raises:
            LoadError: they are too many.
        """
        more = [*self.places, *places]
        if len(more) > HitLimits.HIT_PROBES:
            raise LoadError(
                f"cannot use {len(more)} probes at once: there is room for"
                f" {int(HitLimits.HIT_PROBES)}; ask for fewer"
            )
        self.places = more

    def kinds(self) -> tuple[HitKind, ...]:
        """What each number stands for."""
        return tuple(
            HitKind(place.label, tuple(argument.type for argument in place.arguments))
            for place in self.places
        )

    def links(self) -> list[list[int]]:
        """The numbers of the places that one link can hold: same file, entries or returns."""
        links: dict[tuple[Path, bool], list[int]] = {}
        for number, place in enumerate(self.places):
            links.setdefault((place.path, place.at_return), []).append(number)
        return list(links.values())

    def add_spec(self, spec: ProbeSpec) -> None:
        """Find the places of what a user asked for.

        Raises:
            UsageError: the file has no such probe or function.
            FormatError: the file cannot be read.
        """
        if not spec.path.is_file():
            raise UsageError(no_such_file(spec.path))
        # not resolved: /proc/PID/root would lead to our own files
        file = ProbedFile(spec.path.absolute())
        if file.machine not in REGISTERS:
            raise UsageError(f"{spec.path} is for {file.machine}: only x86-64 and arm64 are known")
        if spec.where == "usdt":
            self.add(usdt_places(spec, file))
        else:
            self.add(self._function_places(spec, file))

    def add_pair(self, pair: Pair, sites: Sequence[UsdtSite], path: Path, provider: str) -> None:
        """Find the places of a pair among a file's USDT probes; none if one of both is missing."""
        begins = [site for site in sites if (site.provider, site.name) == (provider, pair.begin)]
        ends = [site for site in sites if (site.provider, site.name) == (provider, pair.end)]
        if not begins or not ends:
            return
        number = self.new_pair()
        nests = HitFlags.HIT_NESTS if pair.nests else HitFlags(0)
        places = []
        for site in begins:
            types = pair.begin_types if pair.begin_types is not None else pair.carried
            row = HitFlags.HIT_ROW if pair.begin_types is not None else HitFlags(0)
            places.append(
                Place(
                    f"{provider}:{pair.begin}", path, site.offset, site.semaphore,
                    typed_arguments(site, types), HitFlags.HIT_BEGINS | nests | row, number,
                    description=describe(path, site),
                )
            )  # fmt: skip
        for site in ends:
            carried = tuple(Argument(kind, None, which) for which, kind in enumerate(pair.carried))
            own = typed_arguments(site, pair.types)
            places.append(
                Place(
                    f"{provider}:{pair.label}", path, site.offset, site.semaphore,
                    carried + own, HitFlags.HIT_ENDS | nests | HitFlags.HIT_ROW, number,
                    description=describe(path, site),
                )
            )  # fmt: skip
        self.add(places)

    def add_single(
        self, name: str, types: tuple[ArgumentType, ...] | None,
        sites: Sequence[UsdtSite], path: Path, provider: str,
    ) -> None:  # fmt: skip
        """Find the places of one USDT probe; none if it is missing."""
        self.add(
            Place(
                f"{provider}:{name}", path, site.offset, site.semaphore,
                typed_arguments(site, types), description=describe(path, site),
            )
            for site in sites
            if (site.provider, site.name) == (provider, name)
        )  # fmt: skip

    def _function_places(self, spec: ProbeSpec, file: ProbedFile) -> list[Place]:
        address = function_address(spec, file)
        offset = file.code_offset(address)
        if offset is None:
            raise UsageError(f"{spec.text!r}: {spec.path} has no code at {address:#x}")
        returns = spec.where == "uretprobe"
        emulated: bool | None = None
        if spec.name and not spec.offset:
            site = choose_site(SharedLibrary(file.path), offset, at_return=returns)
            address += site.offset - offset
            offset, emulated = site.offset, site.emulated
        elif file.machine == "EM_X86_64":
            emulated = is_emulated(file.code(offset, 16))
        text = f"{spec.text}: {describe_place(file, address, offset, emulated)}"
        if emulated is False:
            self.notes.append(
                f"{spec.text} is at an instruction that the kernel must single-step: each hit costs the"
                " program about 10 us instead of less than one"
            )
        read = argument_operands(spec, file)
        if not returns:
            return [Place(spec.label, file.path, offset, arguments=read, description=text)]
        pair = self.new_pair()
        begins = HitFlags.HIT_BEGINS | HitFlags.HIT_NESTS
        ends = HitFlags.HIT_ENDS | HitFlags.HIT_NESTS | HitFlags.HIT_ROW | HitFlags.HIT_RETURNS
        return [
            Place(spec.label, file.path, offset, role=begins, pair=pair, description=text),
            Place(
                spec.label, file.path, offset, arguments=read, role=ends, pair=pair, at_return=True
            ),
        ]


# ---- places ----


def usdt_places(spec: ProbeSpec, file: ProbedFile) -> list[Place]:
    """All sites of a USDT probe."""
    sites = read_sites(file)
    found = [site for site in sites if (site.provider, site.name) == (spec.provider, spec.name)]
    if found:
        return [
            Place(
                spec.label, file.path, site.offset, site.semaphore,
                typed_arguments(site, spec.types, spec),
                description=f"{spec.text}: {describe(file.path, site)}",
            )
            for site in found
        ]  # fmt: skip
    if not sites:
        raise UsageError(
            f"{spec.path} has no USDT probes; probe one of its functions with"
            f" uprobe:{spec.path}:FUNCTION"
        )
    names = sorted({f"{site.provider}:{site.name}" for site in sites})
    raise UsageError(
        f"{spec.path} has no USDT probe {spec.label}{did_you_mean(spec.label, names) or ';'}"
        f" `scope-ebpf probes {spec.path}` lists the {len(names)} that it has"
    )


def function_address(spec: ProbeSpec, file: ProbedFile) -> int:
    """The address in the file's own numbers of a symbol, a symbol with an offset, or an address.

    Raises:
        UsageError: there is no such function, or no instruction begins there.
    """
    if spec.name:
        if file.is_indirect(spec.name):
            raise UsageError(
                f"{spec.text!r}: {spec.name} is chosen among several functions when a program starts"
                " (IFUNC); name the one that is used, or give its address"
            )
        found = file.functions_named(spec.name)
        if not found:
            hint = did_you_mean(spec.name, file.functions())
            stripped = (
                " (it is stripped: only what it exports has a name)" if file.is_stripped else ""
            )
            raise UsageError(
                f"{spec.path} has no function {spec.name}{stripped}{hint or ';'}"
                f" `nm -D {spec.path}` lists those that it exports"
            )
        if len(found) > 1:
            places = ", ".join(f"{address:#x}" for address in found)
            raise UsageError(
                f"{spec.path} has {len(found)} functions {spec.name}; choose one by its address: {places}"
            )
        address = found[0] + spec.offset
        if not spec.offset:
            return address
    else:
        address = spec.offset
    if file.code_offset(address) is None:
        raise UsageError(f"{spec.text!r}: {spec.path} has no code at {address:#x}")
    begins = file.begins_instruction(address)
    if begins is None:
        raise UsageError(
            f"{spec.text!r}: whether an instruction begins at {address:#x} cannot be told, and a probe"
            " within one would change the program; choose a place in a function that has a symbol"
        )
    if not begins:
        raise UsageError(
            f"{spec.text!r}: {address:#x} lies within an instruction, where a probe would change the"
            f" program; `objdump -d {spec.path}` shows where they begin"
        )
    return address


def no_such_file(path: Path) -> str:
    """A sentence about a file that is not there."""
    if path.is_dir():
        return f"{path} is a directory; name the program or library itself"
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    near = did_you_mean(path.name, names)
    return f"there is no file {path}{near or '; give its whole path, as in /proc/PID/maps'}"


def describe(path: Path, site: UsdtSite) -> str:
    """What was chosen, of a USDT probe."""
    semaphore = ", with a semaphore" if site.semaphore else ""
    unread = "; ".join(
        f"argument {place + 1} cannot be read: {operand.why}"
        for place, operand in enumerate(site.operands)
        if operand.source == "nowhere"
    )
    return (
        f"{path.name} {site.provider}:{site.name} at {site.address:#x}{semaphore}"
        f"{f' ({unread})' if unread else ''}"
    )


def describe_place(file: ProbedFile, address: int, offset: int, emulated: bool | None) -> str:
    """What was chosen, of a function or another place, and what it costs."""
    costs = {
        True: ", which the kernel emulates",
        False: ", which the kernel must single-step: each hit costs ten times as much",
        None: "",
    }
    return f"at {address:#x}, {file.instruction(offset)}{costs[emulated]}"


# ---- arguments ----


def typed_arguments(
    site: UsdtSite, types: tuple[ArgumentType, ...] | None, spec: ProbeSpec | None = None
) -> tuple[Argument, ...]:
    """The arguments of a USDT probe, by its note or as others say.

    Raises:
        UsageError: the probe does not have so many, or not of such a size.
    """
    operands = site.operands[: PythonLimits.HIT_ARGUMENTS]
    if types is None:
        return tuple(Argument(noted_type(operand), operand) for operand in operands)
    asked = "" if spec is None else f"{spec.text!r}: "
    if len(types) > len(operands):
        raise UsageError(
            f"{asked}{site.provider}:{site.name} has {len(site.operands)} arguments, and {len(types)}"
            " types were given; leave some away"
        )
    for place, (kind, operand) in enumerate(zip(types, operands, strict=False), 1):
        if (kind.is_text or kind.form == "float") and kind.size_bytes != operand.size_bytes:
            raise UsageError(
                f"{asked}argument {place} of {site.provider}:{site.name} has {operand.size_bytes} bytes,"
                f" and that type needs {kind.size_bytes}; leave the types away to see it as a number"
            )
    return tuple(Argument(kind, operand) for kind, operand in zip(types, operands, strict=False))


def noted_type(operand: Operand) -> ArgumentType:
    """The type that a note tells."""
    return ArgumentType(
        "float" if operand.floating else "number", operand.size_bytes, operand.signed
    )


def argument_operands(spec: ProbeSpec, file: ProbedFile) -> tuple[Argument, ...]:
    """The arguments, or the result, of a function by the machine's calling convention.

    Raises:
        UsageError: one of them is not in a place that can be read.
    """
    types = spec.types or ()
    if any(kind.form == "float" for kind in types):
        raise UsageError(
            f"{spec.text!r}: floating-point arguments of functions are in vector registers, which"
            " probes cannot read; count the other arguments only"
        )
    registers = REGISTERS[file.machine]
    if spec.where == "uretprobe":
        names: Sequence[str] = (FUNCTION_RESULT[file.machine],)
    else:
        names = FUNCTION_ARGUMENTS[file.machine]
    found = []
    for place, kind in enumerate(types):
        if place < len(names):
            operand = Operand("register", kind.size_bytes, base=registers[names[place]])
        elif not spec.offset and file.machine == "EM_X86_64":
            # behind the return address
            at = STACK_SLOT * (place - len(names) + 1)
            operand = Operand("memory", kind.size_bytes, value=at, base=registers["rsp"])
        else:
            raise UsageError(
                f"{spec.text!r}: only the first {len(names)} arguments can be read there; give fewer types"
            )
        found.append(Argument(kind, operand))
    return tuple(found)


# ---- what the kernel gets ----


def probe_elements(places: Sequence[Place]) -> Records:
    """The elements of `hit_probes`."""
    elements = np.zeros(len(places), HIT_PROBE)
    for element, place in zip(elements, places, strict=True):
        element["pair"], element["role"] = place.pair, place.role
        element["arguments"] = len(place.arguments)
    return elements


def argument_elements(arguments: Sequence[Argument]) -> Records:
    """The elements of `hit_arguments` of one place."""
    elements = np.zeros(PythonLimits.HIT_ARGUMENTS, HIT_ARGUMENT)
    texts = text_places([argument.type for argument in arguments])
    for element, argument, text in zip(elements, arguments, texts, strict=False):
        kind, operand = argument.type, argument.operand
        element["base"] = element["index"] = HitLimits.HIT_NO_REGISTER
        if text is not None:
            element["text"], element["text_begin"], element["text_bytes"] = text
            element["flags"] = HitFlags.HIT_TEXT
        elif kind.signed:
            element["flags"] = HitFlags.HIT_SIGNED
        if operand is None:
            element["source"], element["value"] = HitSource.HIT_CARRIED, argument.carried
            continue
        # no more bytes than there are: those beside them are something else's
        size = min(kind.size_bytes, operand.size_bytes)
        element["bytes"], element["source"] = size, SOURCES[operand.source]
        value = operand.value
        if operand.source == "constant":
            value &= (1 << 8 * size) - 1
            if kind.signed and value >> (8 * size - 1):
                value -= 1 << 8 * size
        element["value"] = value & (1 << 64) - 1
        element["base"] = HitLimits.HIT_NO_REGISTER if operand.base is None else operand.base
        element["index"] = HitLimits.HIT_NO_REGISTER if operand.index is None else operand.index
        element["shift"] = operand.shift
    return elements


def text_places(types: Sequence[ArgumentType]) -> list[tuple[int, int, int] | None]:
    """For each argument: which text it is, and begin and size of it in a hit's bytes; None: it is none."""
    sizes = TEXT_BYTES.get(sum(kind.is_text for kind in types), ())
    found: list[tuple[int, int, int] | None] = []
    begin = number = 0
    for kind in types:
        if kind.is_text and number < len(sizes):
            found.append((number, begin, sizes[number]))
            begin += sizes[number]
            number += 1
        else:
            found.append(None)
    return found
