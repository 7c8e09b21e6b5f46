"""The probes' source in the form that BCC compiles: one text, with BCC's maps and programs.

What is brought into another form, and nothing else: includes (BCC's compiler sees one text), maps and calls
on them, constants that user space sets, global variables, and the first lines of programs. Where the kernel's
side differs, the source itself asks for SCOPE_BCC.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scope_ebpf.errors import LoadError

PROBES = Path(__file__).resolve().parent.parent / "probes"
MAP_TYPES = {
    "HASH": "hash",
    "ARRAY": "array",
    "LRU_HASH": "lru_hash",
}
# In place of what BCC has no use for.
REPLACED = {"python.h": "bcc/no_python.h"}
GLOBALS = "scope_globals"

_INCLUDE = re.compile(r'^[ \t]*#include "([\w/.]+)"[ \t]*$', re.MULTILINE)
_LIBBPF = re.compile(r"^[ \t]*#include <bpf/[^>]*>[ \t]*$", re.MULTILINE)
_MAP = re.compile(
    r"^struct \{\n((?:\t__(?:uint|type)\(.*\n)+)\} (\w+) SEC\(\"\.maps\"\);", re.MULTILINE
)
_MAP_FIELD = re.compile(r"__(?:uint|type)\((\w+), (.*?)\);")
_CONSTANT = re.compile(r"^const volatile (\w+) (\w+) = (\w+);", re.MULTILINE)
_GLOBAL = re.compile(r"^(__u32|__u64) (\w+) = 0;", re.MULTILINE)
_PROGRAM = re.compile(
    r'^SEC\("tp_btf/(\w*)"\)\nint (WRITES\w*|BPF_PROG)\((\w+), ((?:[^()]|\n)*)\)\n\{',
    re.MULTILINE,
)
_LOOKUP = re.compile(r"\bbpf_map_lookup_elem\(&(\w+), ")
_DELETE = re.compile(r"\bbpf_map_delete_elem\(&(\w+), ")
_UPDATE = re.compile(r"\bbpf_map_update_elem\(&(\w+), ([^;]*?), BPF_(ANY|NOEXIST)\)")
_OUTPUT = re.compile(r"\bbpf_perf_event_output\((\w+), &(\w+), BPF_F_CURRENT_CPU, ")
_CONDITION = re.compile(r"[ \t]*#[ \t]*(ifdef|ifndef|if|elif|else|endif)\b")
_PIECE = re.compile(r"/\*.*?\*/", re.DOTALL)


@dataclass
class BccSource:
    """What BCC is given, and what is in it.

    Attributes:
        text: to compile.
        programs: tracepoint of each program.
        maps: of maps, their size in elements.
        globals: offset and bytes of each global variable in the only element of GLOBALS.
    """

    text: str
    programs: dict[str, str] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)
    globals: dict[str, tuple[int, int]] = field(default_factory=dict)


def joined(name: str, defined: Mapping[str, bool], folder: Path = PROBES) -> str:
    """A header with those that it includes, each once, without comments and what is not compiled.

    Args:
        name: of the header.
        defined: whether macros are defined, for `#ifdef` and `#ifndef` of just these.
        folder: of the probes.
    """
    seen: set[str] = set()

    def text_of(path: str) -> str:
        path = REPLACED.get(path, path)
        if path in seen:
            return ""
        seen.add(path)
        text = _PIECE.sub("", (folder / path).read_text())
        text = _chosen(text, defined)
        parent = str(Path(path).parent)

        def include(match: re.Match[str]) -> str:
            inner = match[1]
            beside = inner if parent == "." or (folder / inner).is_file() else f"{parent}/{inner}"
            return text_of(beside)

        return _INCLUDE.sub(include, text)

    return _LIBBPF.sub("", text_of(name))


def _chosen(text: str, defined: Mapping[str, bool]) -> str:
    """The text without the parts that `#ifdef` and `#ifndef` of these macros leave out."""
    kept: list[str] = []
    # of each conditional that is open: whether its lines are kept; None: the compiler decides
    open_now: list[bool | None] = []
    for line in text.splitlines():
        match = _CONDITION.match(line)
        word = match[1] if match else ""
        if word in ("ifdef", "ifndef", "if"):
            name = line.split()[1]
            known = word != "if" and name in defined
            open_now.append(defined[name] == (word == "ifdef") if known else None)
            if known:
                continue
        elif word in ("else", "elif") and open_now[-1] is not None:
            open_now[-1] = not open_now[-1]
            continue
        elif word == "endif" and open_now.pop() is not None:
            continue
        if False not in open_now:
            kept.append(line)
    return "\n".join(kept) + "\n"


def translate(
    text: str,
    constants: Mapping[str, int],
    sizes: Mapping[str, int],
    value_bytes: Mapping[str, int],
    *,
    perf: bool = False,
) -> BccSource:
    """The probes' text in BCC's form.

    Args:
        text: from joined().
        constants: values of `const volatile` variables, in place of those in the source.
        sizes: of maps, in elements, likewise.
        value_bytes: of maps whose values user space sizes.
        perf: records go through perf ring buffers, which programs fill when they end.

    Raises:
        LoadError: a map or a constant has a form that is not known here.
    """
    source = BccSource("")
    text = _CONSTANT.sub(lambda match: _constant(match, constants), text)
    text = _MAP.sub(lambda match: _map(match, source, sizes, value_bytes), text)
    text = _globals(text, source)
    text = _PROGRAM.sub(lambda match: _program(match, source, perf=perf), text)
    text = _LOOKUP.sub(r"\1.lookup(", text)
    text = _OUTPUT.sub(r"\2.perf_submit(\1, ", text)
    text = _DELETE.sub(r"\1.delete(", text)
    text = _UPDATE.sub(
        lambda match: f"{match[1]}.{'update' if match[3] == 'ANY' else 'insert'}({match[2]})", text
    )
    text = re.sub(r"^(?:static )?__noinline\b", "static __always_inline", text, flags=re.MULTILINE)
    if left := re.search(r'SEC\("|const volatile|bpf_map_\w+\(&', text):
        line = text[left.start() :].partition("\n")[0]
        raise LoadError(f"cannot bring the probes into BCC's form at {line!r}; report it as a bug")
    source.text = text
    return source


def _constant(match: re.Match[str], constants: Mapping[str, int]) -> str:
    value = constants.get(match[2], {"false": 0, "true": 1}.get(match[3], match[3]))
    return f"#define {match[2]} (({match[1]}){int(str(value), 0)}ULL)"


def _map(
    match: re.Match[str],
    source: BccSource,
    sizes: Mapping[str, int],
    value_bytes: Mapping[str, int],
) -> str:
    name, fields = match[2], dict(_MAP_FIELD.findall(match[1]))
    kind = MAP_TYPES.get(fields["type"].removeprefix("BPF_MAP_TYPE_"))
    if fields["type"] == "BPF_MAP_TYPE_PERF_EVENT_ARRAY":
        return f"BPF_PERF_OUTPUT({name});"
    if kind is None:
        return f"/* {name} is left out */"
    count = str(sizes.get(name, fields["max_entries"]))
    source.maps[name] = sizes.get(name, 0)
    before, value = "", fields.get("value")
    if value is None:
        value = f"struct {name}_value"
        before = f"{value} {{ __u64 words[{-(-value_bytes[name] // 8)}]; }};\n"
    # before 6.1 maps that grow as needed are not safe in programs of raw tracepoints, and the kernel warns
    flags = "0" if kind == "hash" else fields.get("map_flags", "0")
    return f'{before}BPF_F_TABLE("{kind}", {fields.get("key", "__u32")}, {value}, {name}, {count}, {flags});'


def _globals(text: str, source: BccSource) -> str:
    """Global variables become fields of one element, with a function for each use."""
    for number, (kind, name) in enumerate(_GLOBAL.findall(text)):
        source.globals[name] = (8 * number, 4 if kind == "__u32" else 8)
    text = _GLOBAL.sub("", text)
    functions = []
    for name, (_, size) in source.globals.items():
        text = re.sub(
            rf"\b(?:__sync_fetch_and_add|ADD_TO)\(&{name}, (\w+)\)", rf"add_{name}(\1)", text
        )
        text = re.sub(rf"(?<!__u32 )(?<!__u64 )(?<![\w>.]){name}\b", f"get_{name}()", text)
        kind = "__u32" if size == 4 else "__u64"
        for action, parameter, expression in (
            ("get", "void", f"known->{name}"),
            ("add", "__u64 number", f"__sync_fetch_and_add(&known->{name}, number)"),
        ):
            if f"{action}_{name}(" in text:
                functions.append(
                    f"static __always_inline {kind} {action}_{name}({parameter})\n{{\n"
                    f"\t__u32 first = 0;\n\tstruct {GLOBALS} *known = scope_global.lookup(&first);\n\n"
                    f"\treturn known ? {expression} : 0;\n}}\n"
                )
    # all of 64 bits: LLVM has fetching atomics of 32 bits only for a newer BPF than BCC asks it for
    fields = "".join(f"\t__u64 {name};\n" for name in source.globals)
    declared = (
        f"struct {GLOBALS} {{\n{fields}}};\n"
        f'BPF_F_TABLE("array", __u32, struct {GLOBALS}, scope_global, 1, BPF_F_MMAPABLE);\n'
    )
    # behind the kernel's headers, before the first use
    return (
        text.replace("#define SCOPE_STATE_H\n", "#define SCOPE_STATE_H\n/*globals*/", 1)
        .replace("/*globals*/", "", 1)
        .replace("enum task_phase {", declared + "".join(functions) + "\nenum task_phase {", 1)
    )


def _program(match: re.Match[str], source: BccSource, *, perf: bool) -> str:
    tracepoint, macro, name, arguments = match.groups()
    source.programs[name] = tracepoint
    context = "struct bpf_raw_tracepoint_args *ctx"
    parameters = [" ".join(part.split()) for part in arguments.split(",")]
    types = [re.sub(r"\w+$", "", parameter).strip() for parameter in parameters]
    passed = "".join(f", ({kind})ctx->args[{at}]" for at, kind in enumerate(types))
    head = f"static __always_inline int body_{name}({context}, {', '.join(parameters)})"
    begin, end = "", ""
    # on_message takes over from on_sys_exit, whose end is not reached: all programs here are of one level
    if perf and macro.startswith("WRITES"):
        begin = "\t__u64 before = begin_level(LEVEL_PROGRAM);\n\n"
        end = "\tend_level(ctx, LEVEL_PROGRAM, before, send_few);\n"
    return (
        f"{head};\nint {name}({context})\n{{\n{begin}\tbody_{name}(ctx{passed});\n{end}\treturn 0;\n}}\n"
        f"{head}\n{{"
    )
