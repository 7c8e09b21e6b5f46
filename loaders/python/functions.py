"""Python functions of a live process, found by their names: sys.modules -> module -> class -> function."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from scope_ebpf.cpython.object_offsets import FLAG_TYPE, GENERATOR_FLAGS
from scope_ebpf.cpython.offsets import Layout
from scope_ebpf.errors import TargetError, UsageError
from scope_ebpf.loaders.python.objects import Objects, Unreadable

SPEC = re.compile(r"(?P<module>\w+(?:\.\w+)*):(?P<path>\w+(?:\.\w+)*)")
WRAPPERS_AT_MOST = 16
BUILTINS = (
    "builtin_function_or_method",
    "method_descriptor",
    "wrapper_descriptor",
    "method-wrapper",
)


@dataclass(frozen=True)
class Spec:
    """A function as the user names it."""

    module: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        """As it was written."""
        return f"{self.module}:{'.'.join(self.path)}"


@dataclass(frozen=True)
class Function:
    """A function of a process.

    Attributes:
        spec: its name.
        code: address of its code object, of what it wraps if it wraps something.
        arguments: how many there are by position or name, without * and **.
        generator: a call of it makes a generator or coroutine.
    """

    spec: Spec
    code: int
    arguments: int
    generator: bool


def parse_spec(text: str) -> Spec:
    """A function's name as `module:function` or `module:Class.method`.

    Raises:
        UsageError: it is none.

    >>> parse_spec("shop.views:Cart.checkout")
    Spec(module='shop.views', path=('Cart', 'checkout'))
    """
    match = SPEC.fullmatch(text.strip())
    if match is None:
        if "*" in text:
            reason = "every function needs debug registers of its own, of which there are four"
        elif "<locals>" in text:
            reason = "a function inside of another one is made anew by each call of that"
        else:
            reason = "it names no module and function"
        raise UsageError(
            f"cannot watch calls of {text}: {reason}; write one as module:function"
            " or module:Class.method"
        )
    return Spec(match["module"], tuple(match["path"].split(".")))


class Namespace:
    """The modules of one process, and what is in them."""

    def __init__(self, objects: Objects, layout: Layout, modules: int) -> None:
        """`modules`: address of the dict sys.modules."""
        self._objects = objects
        self._layout = layout
        self._modules = modules

    def builtin(self, name: str) -> int:
        """The address of a builtin such as `int`.

        Raises:
            Unreadable: it could not be found.
        """
        module = self._objects.lookup(self._modules, "builtins")
        return self._objects.lookup(self._objects.word(module + self._layout.module_dict), name)

    def find(self, spec: Spec) -> Function:
        """A function by its name.

        Raises:
            TargetError: there is none of that name, or it is no function written in Python.
        """
        try:
            return self._find(spec)
        except Unreadable as error:
            raise TargetError(
                f"cannot watch calls of {spec}: the process's objects could not be read ({error});"
                " try again"
            ) from error

    def _find(self, spec: Spec) -> Function:
        modules = dict(self._names(self._modules))
        if spec.module not in modules:
            raise TargetError(
                f"cannot watch calls of {spec}: the process has not imported {spec.module}"
                f"{_meant(spec.module, modules)}; attach when it has"
            )
        place, where = modules[spec.module], spec.module
        names = dict(self._names(self._objects.word(place + self._layout.module_dict)))
        for step in spec.path:
            if step not in names:
                raise TargetError(
                    f"cannot watch calls of {spec}: {where} has no {step}{_meant(step, names)};"
                    " name one that it has"
                )
            place, where = names[step], f"{where}.{step}"
            names = dict(self._class_names(place)) if self._is_class(place) else {}
        return self._function(spec, place)

    def _function(self, spec: Spec, place: int) -> Function:
        for _ in range(WRAPPERS_AT_MOST):
            kind = self._objects.type_name(place)
            if kind in ("staticmethod", "classmethod", "property"):
                # sm_callable, cm_callable and prop_get: first behind the header
                place = self._objects.word(place + self._layout.object_bytes)
                continue
            if kind != "function":
                raise _no_function(spec, kind, is_class=self._is_class(place))
            wrapped = self._wrapped(place)
            if wrapped is None:
                return self._described(spec, self._objects.word(place + self._layout.function_code))
            place = wrapped
        raise TargetError(
            f"cannot watch calls of {spec}: it wraps more than {WRAPPERS_AT_MOST} functions;"
            " name the inner one"
        )

    def _wrapped(self, function: int) -> int | None:
        """What a decorator's function wraps, as functools.wraps notes it."""
        attributes = self._objects.word(function + self._layout.function_dict)
        if not attributes:
            return None
        return dict(self._names(attributes)).get("__wrapped__")

    def _described(self, spec: Spec, code: int) -> Function:
        layout, objects = self._layout, self._objects
        if objects.type_name(code) != "code":
            raise Unreadable(f"no code object at {code:#x}")
        arguments = objects.number(code + layout.code_argcount, 4)
        arguments += objects.number(code + layout.code_kwonlyargcount, 4)
        flags = objects.number(code + layout.code_flags, 4)
        return Function(spec, code, arguments, bool(flags & GENERATOR_FLAGS))

    def _is_class(self, place: int) -> bool:
        return bool(self._objects.flags(place) & FLAG_TYPE)

    def _class_names(self, place: int) -> Iterator[tuple[str, int]]:
        """What a class has, the farthest base first, so that nearer ones replace it."""
        for base in reversed(
            self._objects.items(self._objects.word(place + self._layout.type_mro))
        ):
            names = self._objects.word(base + self._layout.type_dict)
            if names:  # from 3.12 on those of builtin types are elsewhere
                yield from self._names(names)

    def _names(self, address: int) -> Iterator[tuple[str, int]]:
        for key, value in self._objects.pairs(address):
            try:
                yield self._objects.text(key), value
            except Unreadable:  # a key that is no str
                continue


def _meant(name: str, names: dict[str, int]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _no_function(spec: Spec, kind: str, *, is_class: bool) -> TargetError:
    if is_class:
        return TargetError(
            f"cannot watch calls of {spec}: it is a class; name one of its methods, such as"
            f" {spec}.__init__"
        )
    if kind in BUILTINS:
        return TargetError(
            f"cannot watch calls of {spec}: it is written in C, so no Python code runs in it;"
            " probe the C function instead, with --probe uprobe"
        )
    return TargetError(
        f"cannot watch calls of {spec}: it is a {kind}, not a function written in Python;"
        " name the function that it calls"
    )
