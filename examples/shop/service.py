"""Start the whole shop privately: PostgreSQL, Redis and gunicorn in one temporary directory.

Nothing of the system's own PostgreSQL or Redis is touched: only their programs are used, with
data, ports and passwords made for this one run. In the foreground, until Ctrl-C:

    python examples/shop/service.py --workers 2
"""

import argparse
import atexit
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from installed import ShopError, postgres_programs, redis_program, require_packages
from interrupts import Terminated, interrupts
from processes import Account, Process, service_account

__all__ = ["Shop", "ShopError"]

HOST = "127.0.0.1"
_HERE = Path(__file__).resolve().parent
_POLL_SECONDS = 0.05
_PORT_ATTEMPTS = 5
_TOO_SLOW = "try again on a less busy machine, or allow more with Shop(start_seconds=...)"


class Shop:
    """The running service, as a context manager; ready to serve once it is entered.

    `pids` maps "postgres", "redis" and "gunicorn" to the pid of each one's main process, `url` is
    where gunicorn listens, `directory` holds data and logs until the end. However the block is
    left (exception, Ctrl-C, SIGTERM), the three are ended and the directory is removed.

        with Shop(workers=2) as shop:
            urllib.request.urlopen(shop.url + "/products/1")
    """

    directory: Path
    url: str

    def __init__(self, *, workers: int = 2, threads: int = 1, start_seconds: float = 60.0) -> None:
        if not 1 <= workers <= 64 or not 1 <= threads <= 64:
            raise ValueError("workers and threads must be from 1 to 64")
        self.workers = workers
        self.threads = threads
        self.pids: dict[str, int] = {}
        self._start_seconds = start_seconds
        self._deadline = 0.0
        self._password = ""
        self._processes: list[Process] = []
        self._running = False

    def __enter__(self) -> "Shop":
        if self._running:
            raise RuntimeError("this Shop is already running; make a second one")
        self._running = True
        interrupts.__enter__()
        # For the few instructions around a `with` in which an exception would skip __exit__.
        atexit.register(self.stop)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End what was started, newest first, and remove the directory. May be called again."""
        try:
            with interrupts.held():
                while self._processes:
                    self._processes[-1].stop()
                    self._processes.pop()
                if self._running and hasattr(self, "directory"):
                    shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            if self._running:
                self._running = False
                atexit.unregister(self.stop)
                interrupts.__exit__(None, None, None)

    def check(self) -> None:
        """Raise ShopError if one of the three has ended by itself."""
        for process in self._processes:
            code = process.exit_code()
            if code is not None:
                raise _failure(process, f"has ended by itself (code {code})", "start it again")

    def _start(self) -> None:
        require_packages()
        programs = postgres_programs()
        redis_server = redis_program()
        self._deadline = time.monotonic() + self._start_seconds
        self._password = secrets.token_urlsafe(16)
        self.pids = {}
        with interrupts.held():
            self.directory = Path(tempfile.mkdtemp(prefix="scope-shop-"))
        # PostgreSQL and Redis run as other users than root and must get to their own folders.
        self.directory.chmod(0o711)
        postgres_port = self._start_postgres(programs)
        redis_port = self._start_redis(redis_server)
        self._start_gunicorn(
            f"postgresql://shop:{self._password}@{HOST}:{postgres_port}/shop",
            f"redis://:{self._password}@{HOST}:{redis_port}/0",
        )

    def _start_postgres(self, programs: Path) -> int:
        account = service_account("postgres", "nobody")
        home = self._make_home("postgres", account)
        password_file = home / "password"
        _write_private(password_file, self._password + "\n", account)
        data = home / "data"
        # No --auth=trust: another user of this machine would be the database's superuser.
        self._run(
            "initdb",
            [
                programs / "initdb",
                f"--pgdata={data}",
                "--username=shop",
                f"--pwfile={password_file}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
            ],
            home,
            account,
        )
        settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "max_connections": str(20 + self.workers * self.threads),
            "shared_buffers": "32MB",
        }

        def start(port: int) -> Process:
            command: list[str | Path] = [programs / "postgres", "-D", data, "-p", str(port)]
            for name, value in settings.items():
                command += ["-c", f"{name}={value}"]
            # SIGINT is its fast shutdown: SIGTERM would wait until every client has gone.
            return self._spawn(
                "postgres", command, home, account, ends=(signal.SIGINT, signal.SIGQUIT)
            )

        def ready(process: Process, _port: int) -> bool:
            # The postmaster writes its state to line 8, which is what pg_ctl waits for as well.
            try:
                lines = (data / "postmaster.pid").read_text().splitlines()
            except OSError:
                return False
            return len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready"

        port = self._start_on_free_port("postgres", start, ready)
        psql: list[str | Path] = [programs / "psql", "-X", "-q", "-w", "-h", HOST]
        psql += ["-v", "ON_ERROR_STOP=1", "-p", str(port), "-U", "shop"]
        create = [*psql, "-d", "postgres", "-c", "CREATE DATABASE shop"]
        fill = [*psql, "-d", "shop", "--single-transaction", "-f", _HERE / "schema.sql"]
        for command in (create, fill):
            self._run("psql", command, self.directory, None, {"PGPASSWORD": self._password})
        return port

    def _start_redis(self, redis_server: Path) -> int:
        account = service_account("redis", "nobody")
        home = self._make_home("redis", account)
        config = home / "redis.conf"

        def start(port: int) -> Process:
            # A file, because a password among the arguments would be seen by `ps`.
            lines = [f"bind {HOST}", f"port {port}", f"requirepass {self._password}"]
            lines += [f"dir {home}", 'save ""', "appendonly no", "daemonize no", 'logfile ""']
            lines += ["maxmemory 64mb", "maxmemory-policy allkeys-lru"]
            _write_private(config, "\n".join(lines) + "\n", account)
            return self._spawn("redis", [redis_server, config], home, account)

        def ready(_process: Process, port: int) -> bool:
            try:
                with socket.create_connection((HOST, port), timeout=1) as connection:
                    connection.sendall(f"AUTH {self._password}\r\n".encode())
                    return connection.recv(64).startswith(b"+OK")
            except OSError:
                return False

        return self._start_on_free_port("redis", start, ready)

    def _start_gunicorn(self, database_url: str, redis_url: str) -> None:
        # Bound here and handed over: with a port that is only probably free, the health check
        # could be answered by somebody else's shop.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((HOST, 0))
            port: int = listener.getsockname()[1]
            command: list[str | Path] = [sys.executable, "-m", "gunicorn"]
            command += ["--config", _HERE / "gunicorn.conf.py"]
            command += ["--chdir", _HERE, "--bind", f"fd://{listener.fileno()}"]
            command += ["--workers", str(self.workers), "--threads", str(self.threads)]
            process = self._spawn(
                "gunicorn",
                [*command, "app:app"],
                self.directory,
                None,
                {
                    "SHOP_DATABASE_URL": database_url,
                    "SHOP_REDIS_URL": redis_url,
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                pass_fds=(listener.fileno(),),
            )
        self._wait_ready(process, lambda: _healthy(port))
        self.url = f"http://{HOST}:{port}"

    def _start_on_free_port(
        self,
        name: str,
        start: Callable[[int], Process],
        ready: Callable[[Process, int], bool],
    ) -> int:
        """Start a server that binds its port itself; again if someone took the port meanwhile."""
        for attempt in range(_PORT_ATTEMPTS):
            port = _free_port()
            process = start(port)
            try:
                self._wait_ready(process, partial(ready, process, port))
            except ShopError:
                taken = "address already in use" in process.log_tail().lower()
                if not taken or attempt == _PORT_ATTEMPTS - 1:
                    raise
                self._forget(process)
                process.log.unlink()
            else:
                return port
        raise AssertionError(f"{name}: the last attempt returns or raises")

    def _wait_ready(self, process: Process, ready: Callable[[], bool]) -> None:
        while process.exit_code() is None:
            if ready():
                return
            if time.monotonic() > self._deadline:
                raise _failure(
                    process,
                    f"is not ready after {self._start_seconds:g} s",
                    _TOO_SLOW,
                )
            time.sleep(_POLL_SECONDS)
        raise _failure(
            process,
            f"did not start: it ended with code {process.exit_code()}",
            "mend what its log says and try again",
        )

    def _run(
        self,
        name: str,
        command: Sequence[str | Path],
        directory: Path,
        account: Account | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a program that ends by itself; it is on our list meanwhile, like the servers."""
        process = self._spawn(name, command, directory, account, environment)
        code = process.wait(self._deadline - time.monotonic())
        if code is None:
            reason = f"has not ended within {self._start_seconds:g} s"
            raise _failure(process, reason, _TOO_SLOW)
        if code != 0:
            raise _failure(
                process, f"failed with code {code}", "mend what its log says and try again"
            )
        self._forget(process)

    def _spawn(
        self,
        name: str,
        command: Sequence[str | Path],
        directory: Path,
        account: Account | None,
        environment: Mapping[str, str] | None = None,
        *,
        pass_fds: Sequence[int] = (),
        ends: Sequence[signal.Signals] = (signal.SIGTERM,),
    ) -> Process:
        # A user's PGOPTIONS, PGSSLMODE or GUNICORN_CMD_ARGS are meant for other servers.
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("PG") and key != "GUNICORN_CMD_ARGS"
        }
        with interrupts.held():
            process = Process(
                name,
                command,
                log=self.directory / f"{name}.log",
                directory=directory,
                environment={**inherited, **(environment or {})},
                account=account,
                pass_fds=pass_fds,
                end_signals=ends,
            )
            self._processes.append(process)
            if name in ("postgres", "redis", "gunicorn"):
                self.pids[name] = process.pid
        return process

    def _forget(self, process: Process) -> None:
        with interrupts.held():
            process.stop()
            self._processes.remove(process)

    def _make_home(self, name: str, account: Account | None) -> Path:
        home = self.directory / name
        home.mkdir(mode=0o700)
        if account is not None:
            for parent in home.parents:
                if not parent.stat().st_mode & 0o001:
                    raise ShopError(
                        f"cannot start {name}: user {account.name} may not enter {parent};"
                        " set TMPDIR to a directory that everyone may enter, such as /tmp"
                    )
            os.chown(home, account.uid, account.gid)
        return home


def _write_private(path: Path, text: str, account: Account | None) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
    if account is not None:
        os.chown(path, account.uid, account.gid)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _failure(process: Process, fact: str, next_step: str) -> ShopError:
    return ShopError(
        f"{process.name} {fact}; {next_step}. Its log ends with:\n{process.log_tail()}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the shop in the foreground; one line of JSON on stdout says where it is."""
    parser = argparse.ArgumentParser(
        description="Run the example shop (PostgreSQL, Redis, gunicorn) privately until Ctrl-C.",
        epilog="example: python examples/shop/service.py --workers 4",
    )
    parser.add_argument("--workers", type=int, default=2, help="gunicorn workers (default: 2)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of each worker (default: 1, sync workers)"
    )
    options = parser.parse_args(arguments)
    started = False
    try:
        shop = Shop(workers=options.workers, threads=options.threads)
        with interrupts, shop:
            place = {"url": shop.url, "pids": shop.pids, "directory": str(shop.directory)}
            print(json.dumps(place), flush=True)
            started = True
            while True:
                time.sleep(0.5)
                shop.check()
    except ValueError as error:
        parser.error(str(error))
    except (KeyboardInterrupt, Terminated) as error:
        # To be told to end is how a running shop ends normally.
        if started:
            return 0
        return 128 + (error.signum if isinstance(error, Terminated) else signal.SIGINT)
    except (ShopError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
