"""What the shop needs to find on this machine, and what to do when it is not there."""

import importlib.util
import shutil
import sys
from pathlib import Path

_PACKAGES = ("flask", "gunicorn", "psycopg2", "redis")
_REQUIREMENTS = Path(__file__).resolve().with_name("requirements.txt")


class ShopError(Exception):
    """The shop cannot start or has died; the message says what, why and what to do."""


def require_packages() -> None:
    """Raise ShopError if this Python lacks one of the packages, without importing any."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ShopError(
            f"cannot start the shop: {sys.executable} has no {', '.join(missing)};"
            f" install with: {sys.executable} -m pip install -r {_REQUIREMENTS}"
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
