"""The shop in two sizes, each started privately in one temporary directory.

`Shop` is one Flask service over PostgreSQL and Redis. `Market` is what such a service becomes:
nginx, three services that call each other, PostgreSQL, Redis and a worker that sends mails.

Nothing of the system's own servers is touched: only their programs are used, with data, ports and
passwords made for this one run. In the foreground, until Ctrl-C:

    python examples/shop/service.py --workers 2
    python examples/shop/service.py --market
"""

import argparse
import json
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from installed import (
    ShopError,
    nginx_program,
    postgres_programs,
    redis_program,
    require_opentelemetry,
    require_packages,
    rq_program,
)
from interrupts import Terminated, interrupts
from servers import (
    Service,
    kill,
    start_gunicorn,
    start_mail_worker,
    start_nginx,
    start_postgres,
    start_receiver,
    start_redis,
)
from supervision import Supervisor

__all__ = ["Market", "Shop", "ShopError"]

# Longer than those who keep a connection (nginx, requests) leave one unused in a run: a service
# that closes first could do so just when the next request comes.
_KEEP_ALIVE_SECONDS = 75


class Shop(Supervisor):
    """The small shop, as a context manager; ready to serve once it is entered.

    `pids` maps "postgres", "redis" and "gunicorn" to the pid of each one's main process, `url` is
    where gunicorn listens, `directory` holds data and logs until the end. However the block is
    left (exception, Ctrl-C, SIGTERM), the three are ended and the directory is removed.

        with Shop(workers=2) as shop:
            urllib.request.urlopen(shop.url + "/products/1")
    """

    url: str

    def __init__(self, *, workers: int = 2, threads: int = 1, start_seconds: float = 60.0) -> None:
        super().__init__(start_seconds)
        _check_counts(workers, threads)
        self.workers = workers
        self.threads = threads

    def start(self) -> None:
        """Start the three."""
        require_packages("flask", "gunicorn", "psycopg2", "redis")
        redis_program()
        password = secrets.token_urlsafe(16)
        database = start_postgres(self, password, self.workers * self.threads)
        environment = {
            "SHOP_DATABASE_URL": database,
            "SHOP_REDIS_URL": start_redis(self, password),
        }
        service = start_gunicorn(
            self, "gunicorn", "app:app", environment, workers=self.workers, threads=self.threads
        )
        self.wait_ready(service.process, service.healthy)
        self.url = service.url


class Market(Supervisor):
    """The whole shop, as a context manager; ready to serve once it is entered.

    `url` is where nginx listens, and `urls` has those of "nginx", "web", "inventory", "payment",
    "postgres" and "redis" (the last two with the password). `pids` maps these names and "worker"
    (and "receiver", see `otel`) to the pid of each one's main process.

    Args:
        workers, threads: of each of the three services; more than one thread is gunicorn's gthread
            worker, which keeps connections, and one is its sync worker, which does not.
        keep_alive: whether nginx keeps its connections to web.
        simple_worker: run the mail jobs in the RQ worker itself and not in a fork of it.
        race: reserve stock without a lock, so that checkouts at one time lose each other's.
        truth: send each request's id through every hop and have the services note what they do;
            `truth_lines` reads it.
        otel: start the services with OpenTelemetry's instrumentation; `otel_spans` reads its spans.
    """

    url: str

    def __init__(
        self,
        *,
        workers: int = 2,
        threads: int = 1,
        keep_alive: bool = True,
        simple_worker: bool = False,
        race: bool = False,
        truth: bool = False,
        otel: bool = False,
        start_seconds: float = 60.0,
    ) -> None:
        super().__init__(start_seconds)
        _check_counts(workers, threads)
        self.workers = workers
        self.threads = threads
        self.keep_alive = keep_alive
        self.simple_worker = simple_worker
        self.race = race
        self.truth = truth
        self.otel = otel
        self.urls: dict[str, str] = {}

    def start(self) -> None:
        """Start them all: what is asked before who asks."""
        require_packages("flask", "gunicorn", "psycopg2", "redis", "requests", "rq")
        if self.otel:
            require_opentelemetry()
        for program in (postgres_programs, redis_program, nginx_program, rq_program):
            program()
        password = secrets.token_urlsafe(16)
        # Each service keeps one connection per thread; the worker has one or two.
        database = start_postgres(self, password, 3 * self.workers * self.threads + 5)
        everyone = {"SHOP_DATABASE_URL": database}
        if self.truth:
            everyone["SHOP_TRUTH"] = str(self._truth_log)
        if self.otel:
            everyone["SHOP_OTEL_URL"] = start_receiver(self, self._otel_log)
        cache = start_redis(self, password)
        asks_redis = {**everyone, "SHOP_REDIS_URL": cache}
        inventory = self._start_service("inventory", {**everyone, "SHOP_RACE": str(int(self.race))})
        payment = self._start_service("payment", everyone)
        web = self._start_service(
            "web",
            {
                **asks_redis,
                "SHOP_INVENTORY_URL": inventory.url,
                "SHOP_PAYMENT_URL": payment.url,
            },
        )
        start_mail_worker(self, {**asks_redis, "SHOP_SERVICE": "worker"}, simple=self.simple_worker)
        services = {"web": web, "inventory": inventory, "payment": payment}
        for service in services.values():
            self.wait_ready(service.process, service.healthy)
        port = start_nginx(self, web.port, keep_alive=self.keep_alive)
        self.url = f"http://127.0.0.1:{port}"
        self.urls = {name: each.url for name, each in services.items()}
        self.urls |= {"nginx": self.url, "postgres": database, "redis": cache}

    def kill(self, name: str) -> None:
        """Kill one of the main processes, as a crash would; `check` tells of it from then on."""
        kill(self.pids[name])

    def truth_lines(self) -> list[dict[str, Any]]:
        """Read what the services noted so far; truth.py says what a line holds.

        A request's own line is written when its answer is sent: a moment after the client has it.
        """
        return _read_lines(self._truth_log)

    def otel_spans(self) -> list[dict[str, Any]]:
        """Read the OpenTelemetry spans so far; otel.py says what a span holds, and when it comes."""
        return _read_lines(self._otel_log)

    @property
    def _truth_log(self) -> Path:
        return self.directory / "truth.jsonl"

    @property
    def _otel_log(self) -> Path:
        return self.directory / "otel.jsonl"

    def _start_service(self, name: str, environment: dict[str, str]) -> Service:
        return start_gunicorn(
            self,
            name,
            f"{name}:app",
            {**environment, "SHOP_SERVICE": name},
            workers=self.workers,
            threads=self.threads,
            keep_alive_seconds=_KEEP_ALIVE_SECONDS,
        )


def _check_counts(workers: int, threads: int) -> None:
    if not 1 <= workers <= 64 or not 1 <= threads <= 64:
        raise ValueError("workers and threads must be from 1 to 64")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # What is being written may lack its end.
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the shop in the foreground; one line of JSON on stdout says where it is."""
    parser = argparse.ArgumentParser(
        description="Run the example shop (PostgreSQL, Redis, gunicorn) privately until Ctrl-C.",
        epilog="example: python examples/shop/service.py --market --threads 4",
    )
    parser.add_argument("--workers", type=int, default=2, help="gunicorn workers (default: 2)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of each worker (default: 1, sync workers)"
    )
    market = parser.add_argument_group("the whole shop")
    market.add_argument(
        "--market", action="store_true", help="nginx, three services and the mail worker as well"
    )
    market.add_argument(
        "--no-keep-alive", action="store_true", help="nginx makes a connection for each request"
    )
    market.add_argument(
        "--simple-worker", action="store_true", help="the mail worker does not fork for each job"
    )
    market.add_argument("--race", action="store_true", help="reserve stock without a lock")
    market.add_argument("--truth", action="store_true", help="have the services note what they do")
    market.add_argument("--otel", action="store_true", help="with OpenTelemetry's instrumentation")
    options = parser.parse_args(arguments)
    only = [options.no_keep_alive, options.simple_worker, options.race, options.truth, options.otel]
    if any(only) and not options.market:
        parser.error("the options of the whole shop need --market")
    started = False
    try:
        shop: Shop | Market = Shop(workers=options.workers, threads=options.threads)
        if options.market:
            shop = Market(
                workers=options.workers,
                threads=options.threads,
                keep_alive=not options.no_keep_alive,
                simple_worker=options.simple_worker,
                race=options.race,
                truth=options.truth,
                otel=options.otel,
            )
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
