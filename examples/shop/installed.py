"""What the shop needs to find on this machine, and what to do when it is not there."""

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

_REQUIREMENTS = Path(__file__).resolve().with_name("requirements.txt")
_OPENTELEMETRY = (
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-instrumentation-flask",
    "opentelemetry-instrumentation-psycopg2",
    "opentelemetry-instrumentation-redis",
    "opentelemetry-instrumentation-requests",
)


class ShopError(Exception):
    """The shop cannot start or has died; the message says what, why and what to do."""


def require_packages(*names: str) -> None:
    """Raise ShopError if this Python lacks one of the packages, without importing any."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ShopError(
            f"cannot start the shop: {sys.executable} has no {', '.join(missing)};"
            f" install with: {sys.executable} -m pip install -r {_REQUIREMENTS}"
        )


def require_opentelemetry() -> None:
    """Raise ShopError if OpenTelemetry's packages are missing."""
    modules = ["sdk.trace", "exporter.otlp.proto.http"]
    modules += [f"instrumentation.{name}" for name in ("flask", "psycopg2", "redis", "requests")]
    for module in modules:
        try:
            found = importlib.util.find_spec(f"opentelemetry.{module}")
        except ModuleNotFoundError:  # of a parent of it
            found = None
        if found is None:
            raise ShopError(
                f"cannot start the shop with OpenTelemetry: {sys.executable} has no"
                f" opentelemetry.{module}; install with: {sys.executable} -m pip install"
                f" {' '.join(_OPENTELEMETRY)}"
            )


def postgres_programs() -> Path:
    """Return the folder of the newest PostgreSQL major that is installed with its server."""
    # Debian keeps every major apart and only links the clients to the PATH.
    majors = [
        path.parent
        for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")
        if path.parent.parent.name.isdigit()
        and all((path.parent / name).exists() for name in ("postgres", "psql"))
    ]
    if not majors:
        raise ShopError(
            "cannot start PostgreSQL: there is no server in /usr/lib/postgresql/*/bin;"
            " install it with: apt install postgresql"
        )
    return max(majors, key=lambda path: int(path.parent.name))


def redis_program() -> Path:
    """Return the Redis server's program."""
    found = shutil.which("redis-server")
    if found is None:
        raise ShopError(
            "cannot start Redis: redis-server is not on the PATH;"
            " install it with: apt install redis-server"
        )
    return Path(found)


def nginx_program() -> Path:
    """Return nginx."""
    # Debian has it where only root's PATH leads.
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ShopError(
            "cannot start nginx: it is neither on the PATH nor in /usr/sbin;"
            " install it with: apt install nginx-light"
        )
    return Path(found)


def rq_program() -> Path:
    """Return the command `rq` of this Python."""
    places = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    for place in places:
        if (place / "rq").exists():
            return place / "rq"
    raise ShopError(
        f"cannot start the mail worker: there is no rq in {places[0]};"
        f" install it with: {sys.executable} -m pip install -r {_REQUIREMENTS}"
    )
