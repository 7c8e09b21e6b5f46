"""How gunicorn runs real_flask.py: gunicorn --config python:tests.live.programs.real_gunicorn --bind fd://FD."""

from gevent import monkey

# before anything that is patched is imported
monkey.patch_all()

from typing import Any  # noqa: E402

wsgi_app = "tests.live.programs.real_flask:app"
worker_class = "gevent"
loglevel = "warning"
control_socket_disable = True


def post_worker_init(_: Any) -> None:
    """The worker is about to serve."""
    from tests.live.programs.real_flask import prepare

    prepare()
    print("ready", flush=True)
