"""The service that customers reach through nginx: it asks inventory and payment over HTTP."""

import json
from collections.abc import Mapping
from typing import Any

import otel
import redis
import rq
import truth
from answers import RefusedError, log, make_app, pages, wanted
from clients import ask, read, redis_client, transaction
from flask import Response, jsonify, request
from requests import RequestException

# Short, so that a run of some seconds shows both hits and misses.
CACHE_TTL_SECONDS = 5
# What RQ keeps in Redis of a job that is done; Redis has 64 MB.
RESULT_TTL_SECONDS = 60

app = make_app(__name__)
app.register_blueprint(pages)
cache = redis_client()
mails = rq.Queue("mail", connection=cache)


@app.get("/health")
def health() -> Response:
    """Answer 200 when PostgreSQL and Redis answer."""
    read("SELECT 1")
    cache.ping()
    return jsonify(status="ok")


@app.get("/products/<int:product_id>")
def show_product(product_id: int) -> Response:
    """Show one product with its stock: from the cache, or from inventory and then cached."""
    key = f"product:{product_id}"
    body: Any = cache.get(key)
    if body is None:
        body = json.dumps(_asked("inventory", "GET", f"/products/{product_id}")).encode()
        cache.set(key, body, ex=CACHE_TTL_SECONDS)
    return Response(body, mimetype="application/json")


@app.post("/checkout")
def checkout() -> tuple[Response, int]:
    """Sell some of one product: reserve it, take the money, note the order, queue its mail."""
    product_id, quantity = wanted(request.get_json(silent=True))
    goods = {"product": product_id, "quantity": quantity}
    total_cents = quantity * _asked("inventory", "POST", "/reserve", goods)["price_cents"]
    try:
        payment = _asked("payment", "POST", "/payments", {"amount_cents": total_cents})
    except (RefusedError, RequestException):
        _asked("inventory", "POST", "/release", goods)
        raise
    with transaction() as cursor:
        cursor.execute(
            "INSERT INTO orders (product_id, quantity, total_cents)"
            " VALUES (%s, %s, %s) RETURNING id",
            (product_id, quantity, total_cents),
        )
        (order_id,) = cursor.fetchone()
        cursor.execute(
            "UPDATE payments SET order_id = %s WHERE id = %s", (order_id, payment["payment"])
        )
    job_id = _queue_mail(order_id, product_id)
    return jsonify(order=order_id, total_cents=total_cents, job_id=job_id), 201


def _asked(
    service: str, method: str, path: str, body: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return a service's answer; what it refuses to us, we refuse to the customer."""
    response = ask(service, method, path, body)
    if response.status_code >= 400:
        raise RefusedError(response.status_code, response.json()["error"])
    answer: dict[str, Any] = response.json()
    return answer


def _queue_mail(order_id: int, product_id: int) -> str | None:
    """Queue the order's mail and forget the cached stock; None when Redis does not answer."""
    try:
        job = mails.enqueue(
            "mail.send_order_mail",
            order_id,
            result_ttl=RESULT_TTL_SECONDS,
            meta=otel.carrier(),
            **truth.job_arguments(),
        )
        cache.delete(f"product:{product_id}")
    except redis.RedisError as error:
        # The order is committed: an error answer would have the customer buy it again.
        log.warning("order %s has no mail job: %s", order_id, error)
        return None
    return job.id
