"""The small shop: one Flask app over PostgreSQL and Redis, small enough to read before tracing it.

`SHOP_DATABASE_URL` and `SHOP_REDIS_URL` say where its two services are; service.py sets them.
"""

import json
import uuid
from typing import Any

import redis
from answers import find_product, log, make_app, no_product, pages, sold_out, wanted
from clients import read, redis_client, transaction
from flask import Response, jsonify, request

# Short, so that a run of some seconds shows both hits and misses.
CACHE_TTL_SECONDS = 5
JOB_QUEUE = "shop:jobs"
# Nobody has to consume the queue, so it must not grow without end.
JOB_QUEUE_LIMIT = 1000

app = make_app(__name__)
app.register_blueprint(pages)
cache = redis_client()


@app.get("/health")
def health() -> Response:
    """Answer 200 when both services answer."""
    read("SELECT 1")
    cache.ping()
    return jsonify(status="ok")


@app.get("/products/<int:product_id>")
def show_product(product_id: int) -> Response:
    """Show one product with its stock: from the cache, or from SQL and then cached."""
    key = f"product:{product_id}"
    body: Any = cache.get(key)
    if body is None:
        body = json.dumps(find_product(product_id)).encode()
        cache.set(key, body, ex=CACHE_TTL_SECONDS)
    return Response(body, mimetype="application/json")


@app.post("/checkout")
def checkout() -> tuple[Response, int]:
    """Sell some of one product: stock, order and payment in one transaction, then a job."""
    product_id, quantity = wanted(request.get_json(silent=True))
    with transaction() as cursor:
        # Two checkouts of one product wait for each other here, and only here.
        cursor.execute(
            "SELECT i.stock, p.price_cents FROM inventory i JOIN products p ON p.id = i.product_id"
            " WHERE i.product_id = %s FOR UPDATE OF i",
            (product_id,),
        )
        found = cursor.fetchone()
        if found is None:
            raise no_product(product_id)
        stock, price_cents = found
        if stock < quantity:
            raise sold_out(product_id, stock)
        cursor.execute(
            "UPDATE inventory SET stock = stock - %s WHERE product_id = %s", (quantity, product_id)
        )
        cursor.execute(
            "INSERT INTO orders (product_id, quantity, total_cents)"
            " VALUES (%s, %s, %s) RETURNING id",
            (product_id, quantity, quantity * price_cents),
        )
        (order_id,) = cursor.fetchone()
        cursor.execute(
            "INSERT INTO payments (order_id, amount_cents, status) VALUES (%s, %s, 'captured')",
            (order_id, quantity * price_cents),
        )
    job_id = _queue_receipt(order_id, product_id)
    return jsonify(order=order_id, total_cents=quantity * price_cents, job_id=job_id), 201


def _queue_receipt(order_id: int, product_id: int) -> str | None:
    """Push the receipt's job and forget the cached stock; None when Redis does not answer."""
    job_id = uuid.uuid4().hex
    job = {"job_id": job_id, "job": "send_receipt", "order": order_id}
    try:
        pipeline = cache.pipeline(transaction=False)
        pipeline.lpush(JOB_QUEUE, json.dumps(job))
        pipeline.ltrim(JOB_QUEUE, 0, JOB_QUEUE_LIMIT - 1)
        pipeline.delete(f"product:{product_id}")
        pipeline.execute()
    except redis.RedisError as error:
        # The order is committed: an error answer would have the customer buy it again.
        log.warning("order %s has no receipt job: %s", order_id, error)
        return None
    return job_id
