"""What a program is called, by its command line: `gunicorn -w 4 shop.web:app` is web."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

# A module or script of such a name says nothing about what it is; what it is in does.
_GENERIC: Final = {"app", "main", "wsgi", "asgi", "application", "__main__"}
# Where the workers of a queue look for their tasks.
_GENERIC_TASKS: Final = _GENERIC | {
    "celery", "celery_app", "celeryapp", "tasks", "actors", "broker",
}  # fmt: skip
# Folders in which programs lie, whatever they are.
_PLACES: Final = {
    "/",
    "src",
    "code",
    "bin",
    "srv",
    "opt",
    "usr",
    "local",
    "lib",
    "var",
    "www",
    "tmp",
}

_INTERPRETER: Final = re.compile(r"(python|pypy)[\d.]*t?")
_INTERPRETER_VALUES: Final = {"-W", "-X", "--check-hash-based-pycs"}
_MODULE: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_APPLICATION: Final = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)(?::[A-Za-z_][\w.]*(?:\(.*\))?)?")

_BINARIES: Final = {
    "postgres": "postgresql",
    "postmaster": "postgresql",
    "redis-server": "redis",
    "valkey-server": "valkey",
    "nginx": "nginx",
    "mysqld": "mysql",
    "mariadbd": "mysql",
    "memcached": "memcached",
    "pgbouncer": "pgbouncer",
    "haproxy": "haproxy",
    "mongod": "mongodb",
}

# Options without a value, so that the word after one is not taken for its value: those of gunicorn
# (gunicorn/config.py), uvicorn and hypercorn, and of rq.
_FLAGS: Final = {
    "--reload", "--spew", "--check-config", "--print-config", "--preload", "--reuse-port", "-D",
    "--daemon", "--initgroups", "--disable-redirect-access-to-syslog", "--capture-output", "-R",
    "--log-syslog", "--enable-stdio-inheritance", "--enable-backlog-metric", "--no-control-socket",
    "--suppress-ragged-eofs", "--do-handshake-on-connect", "--permit-obsolete-folding",
    "--strip-header-spaces", "--permit-unconventional-http-method", "--casefold-http-method",
    "--permit-unconventional-http-version", "--no-sendfile", "--access-log", "--no-access-log",
    "--use-colors", "--no-use-colors", "--proxy-headers", "--no-proxy-headers", "--server-header",
    "--no-server-header", "--date-header", "--no-date-header", "--factory", "--debug",
}  # fmt: skip
_RQ_FLAGS: Final = {
    "-b", "--burst", "--disable-job-desc-logging", "-v", "--verbose", "-q", "--quiet", "-s",
    "--with-scheduler", "-d", "--disable-default-exception-handler",
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """What a command line tells about the service that it runs."""

    name: str | None
    """Its name; None: the command line tells none (`gunicorn app:app`), something else may."""
    fallback: str
    """Its name if nothing else tells one."""
    identity: str = ""
    """What tells it from another one of the same name: the full module or path; empty: nothing."""
    inherits: bool = False
    """It is a helper of its parent, and has its parent's name."""


_CHILD: Final = Program(None, "python", inherits=True)


def program_of(command_line: str | None, comm: str | None) -> Program | None:
    """The program of a shell-quoted command line; None if no rule knows it.

    >>> program_of("/usr/bin/python3 /usr/bin/gunicorn -w 4 shop.web:app", "gunicorn").name
    'web'
    >>> program_of("sleep 10", "sleep") is None
    True
    """
    arguments = _split(command_line or "")
    if not arguments:
        return _binary(comm or "")
    titled = _titled(" ".join(arguments).strip())
    if titled is not None:
        return titled
    head = PurePosixPath(arguments[0]).name
    if _INTERPRETER.fullmatch(head):
        return _python(arguments[1:])
    tool = _TOOLS.get(head)
    return tool(arguments[1:]) if tool else _binary(head)


def _split(command_line: str) -> list[str]:
    try:
        return shlex.split(command_line)
    except ValueError:  # it does not come from us
        return command_line.split()


def _binary(name: str) -> Program | None:
    known = _BINARIES.get(name)
    return Program(known, known) if known else None


def _titled(title: str) -> Program | None:
    """Processes that write a title over their command line: setproctitle's users, PostgreSQL, …"""
    if match := re.match(r"(postgres|nginx): ", title):
        return _binary(match[1])
    # server.c, redisSetProcTitle: `/usr/bin/redis-server *:6379`, as one argument.
    if match := re.match(r"(?:/\S*/)?((?:redis|valkey)-server) ", title):
        return _binary(match[1])
    # gunicorn/util.py, _setproctitle: the application, or the name that --name gave.
    if match := re.match(r"gunicorn: (?:master|worker|arbiter|dirty\S*) \[([^]]+)\]", title):
        return _application([match[1]], "gunicorn") if _APPLICATION.fullmatch(match[1]) else (
            Program(match[1], match[1], match[1])
        )  # fmt: skip
    # celery/platforms.py, set_process_title: `[celeryd: worker@host:MainProcess] -active- (…)`.
    if match := re.match(r"\[celery\w*: [^]]*\](?:.*\((.*)\)?)?", title):
        return _celery((match[1] or "").rstrip(")").split())
    # rq/worker/base.py, procline.
    if match := re.match(r"rq:worker:\S+: (?:\*\*\* )?(?:Listening on (\S+?)(?:\.\.\.)?$)?", title):
        return _rq_queues((match[1] or "").split(","))
    if title.startswith("uWSGI "):
        return Program(None, "uwsgi")
    return None


def _python(arguments: Sequence[str]) -> Program | None:
    """What an interpreter runs: a module, a script or a tool that is one."""
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        option = rest.pop(0)
        if option.startswith("-c") or option == "--multiprocessing-fork":
            # The children of multiprocessing's spawn and forkserver methods, and its trackers.
            return _CHILD if "multiprocessing" in " ".join([option, *rest]) else None
        if option == "-m" and rest:
            return _module(rest[0], rest[1:])
        if option in _INTERPRETER_VALUES and rest:
            rest.pop(0)
    return _script(rest[0], rest[1:]) if rest and rest[0] != "-" else None


def _module(module: str, arguments: Sequence[str]) -> Program:
    tool = _TOOLS.get(module.partition(".")[0])
    if tool:
        return tool(arguments)
    name = module.removesuffix(".__main__")
    return Program(name, name, name)


def _script(script: str, arguments: Sequence[str]) -> Program:
    path = PurePosixPath(script)
    if path.suffix != ".py":
        tool = _TOOLS.get(path.name)
        return tool(arguments) if tool else Program(path.name, path.name, script)
    folder = _folder(str(path.parent))
    if path.name == "manage.py":
        name = folder or "manage"
        command = arguments[0] if arguments and not arguments[0].startswith("-") else "runserver"
        if command not in ("runserver", "runserver_plus"):
            name = f"{name}:{command}"
        return Program(name, name, script)
    return Program(folder if path.stem in _GENERIC else path.stem, path.stem, script)


def _folder(path: str) -> str | None:
    """The name of the folder that a program is in; None if that says nothing."""
    parts = list(PurePosixPath(path).parts)
    if parts[:2] == ["/", "home"]:
        parts = parts[3:]
    for part in reversed(parts[-2:]):
        if part not in _PLACES | _GENERIC | {".", ".."}:
            return part
    return None


def _option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of an option: `--app proj`, `--app=proj`, `-A proj`, `-Aproj`."""
    for index, argument in enumerate(arguments):
        for name in names:
            if argument == name:
                return arguments[index + 1] if index + 1 < len(arguments) else None
            if argument.startswith(f"{name}=") and name.startswith("--"):
                return argument.partition("=")[2]
            if argument.startswith(name) and not name.startswith("--"):
                return argument.removeprefix(name)
    return None


def _positional(arguments: Sequence[str], flags: set[str]) -> list[str]:
    """The words that are neither options nor, as far as one can tell, their values."""
    found = []
    before = ""
    for argument in arguments:
        value = before.startswith("-") and "=" not in before and before not in flags
        if not argument.startswith("-") and not value:
            found.append(argument)
        # What follows a value is no value.
        before = "" if value and not argument.startswith("-") else argument
    return found


def _named(
    module: str, fallback: str = "", folder: str | None = None, *, generic: set[str] = _GENERIC
) -> Program:
    """A program by its module: the last part of it that says something, else its folder."""
    parts = module.split(".")
    telling = [part for part in parts if part not in generic]
    identity = module if telling or not folder else f"{folder.rstrip('/')}/{module}"
    name = telling[-1] if telling else _folder(folder) if folder else None
    return Program(name, fallback or parts[-1], identity)


def _application(arguments: Sequence[str], tool: str) -> Program:
    """Servers that get `module:attribute`."""
    if tool == "gunicorn" and (name := _option(arguments, "--name", "-n")):
        return Program(name, name, name)
    found = [word for word in _positional(arguments, _FLAGS) if _APPLICATION.fullmatch(word)]
    found.sort(key=lambda word: ":" not in word)  # stable: `web:app` before any other word
    match = _APPLICATION.fullmatch(found[0]) if found else None
    if match is None:
        return Program(None, tool)
    folder = _option(arguments, "--chdir", "--app-dir", "--pythonpath", "--working-dir")
    return _named(match[1], folder=folder)


def _server(tool: str) -> Callable[[Sequence[str]], Program]:
    return lambda arguments: _application(arguments, tool)


def _uwsgi(arguments: Sequence[str]) -> Program:
    folder = _option(arguments, "--chdir", "--pythonpath")
    module = _option(arguments, "--module", "--wsgi", "-w")
    if module and _APPLICATION.fullmatch(module):
        return _named(module.split(":")[0], folder=folder)
    if file := _option(arguments, "--wsgi-file", "--file"):
        return _script(str(PurePosixPath(folder or "", file)), ())
    files = [word for word in arguments if word.endswith(".ini")]
    config = _option(arguments, "--ini") or (files[0] if files else "")
    stem = PurePosixPath(config).stem
    return Program(None if stem in {"", "uwsgi"} | _GENERIC else stem, "uwsgi", config)


def _flask(arguments: Sequence[str]) -> Program:
    target = _option(arguments, "--app", "-A") or ""
    if ".py" in target or "/" in target:
        return _script(target.split(":")[0].removesuffix(".py") + ".py", ())
    match = _APPLICATION.fullmatch(target)
    return _named(match[1]) if match else Program(None, "flask")


def _fastapi(arguments: Sequence[str]) -> Program:
    files = [word for word in _positional(arguments, _FLAGS) if word.endswith(".py")]
    return _script(files[0], ()) if files else Program(None, "fastapi")


def _prefixed(prefix: str, module: str, folder: str | None) -> Program:
    """A worker of a queue: its tool and its module, since the web side may have the same name."""
    found = _named(module, folder=folder, generic=_GENERIC_TASKS)
    return Program(f"{prefix}:{found.name or found.fallback}", prefix, f"{prefix}:{found.identity}")


def _celery(arguments: Sequence[str]) -> Program:
    application = _option(arguments, "--app", "-A") or ""
    role = next((f"celery-{word}" for word in arguments if word in ("beat", "flower")), "celery")
    match = _APPLICATION.fullmatch(application)
    if match is None:
        return Program(role, role)
    return _prefixed(role, match[1], _option(arguments, "--workdir"))


def _dramatiq(arguments: Sequence[str]) -> Program:
    found = [word for word in _positional(arguments, set()) if _APPLICATION.fullmatch(word)]
    if not found:
        return Program("dramatiq", "dramatiq")
    return _prefixed("dramatiq", found[0].split(":")[0], None)


def _rq(arguments: Sequence[str]) -> Program:
    words = _positional(arguments, _RQ_FLAGS)
    if words[:1] not in (["worker"], ["worker-pool"]):
        name = f"rq-{words[0]}" if words and _MODULE.fullmatch(words[0]) else "rq"
        return Program(name, name)
    return _rq_queues(words[1:])


def _rq_queues(queues: Sequence[str]) -> Program:
    """A worker of RQ is known by its queues; those of `default` alone are just rq."""
    names = ",".join(queues)
    name = "rq" if names in ("", "default") else f"rq:{names}"
    return Program(name, name)


_TOOLS: Final[dict[str, Callable[[Sequence[str]], Program]]] = {
    **{
        tool: _server(tool)
        for tool in ("gunicorn", "uvicorn", "hypercorn", "daphne", "granian", "waitress-serve")
    },
    "uwsgi": _uwsgi,
    "flask": _flask,
    "fastapi": _fastapi,
    "celery": _celery,
    "dramatiq": _dramatiq,
    "rq": _rq,
}
