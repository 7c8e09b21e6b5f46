"""The shop: a Flask app over PostgreSQL and Redis, small enough to read before tracing it.

`SHOP_DATABASE_URL` and `SHOP_REDIS_URL` say where its two services are; service.py sets them.
"""

import json
import logging
import os
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg2
import psycopg2.extensions
import redis
from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

# Short, so that a run of some seconds shows both hits and misses.
CACHE_TTL_SECONDS = 5
LIST_LIMIT = 50
MAX_QUANTITY = 100
JOB_QUEUE = "shop:jobs"
# Nobody has to consume the queue, so it must not grow without end.
JOB_QUEUE_LIMIT = 1000

log = logging.getLogger("shop")
app = Flask(__name__)
# The connection is made by each worker at its first command, so nothing is shared across fork.
cache = redis.Redis.from_url(os.environ["SHOP_REDIS_URL"], socket_timeout=5)
_thread = threading.local()


class RefusedError(Exception):
    """A request that the shop answers with an error: the HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def database() -> psycopg2.extensions.connection:
    """Return this thread's own connection; make it again when the server has closed the last."""
    connection: psycopg2.extensions.connection | None = getattr(_thread, "connection", None)
    if connection is None or connection.closed:
        connection = psycopg2.connect(
            os.environ["SHOP_DATABASE_URL"], connect_timeout=5, application_name="shop"
        )
        # Single reads need no BEGIN and COMMIT; `with connection` still opens a transaction.
        connection.autocommit = True
        _thread.connection = connection
    return connection


def read(sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
    """Run one query outside any transaction and return its rows."""
    with database().cursor() as cursor:
        cursor.execute(sql, values)
        return cursor.fetchall()


@app.get("/health")
def health() -> Response:
    """Answer 200 when both services answer."""
    read("SELECT 1")
    cache.ping()
    return jsonify(status="ok")


@app.get("/products")
def list_products() -> Response:
    """List the first products; always from SQL."""
    rows = read("SELECT id, name, price_cents FROM products ORDER BY id LIMIT %s", (LIST_LIMIT,))
    products = [{"id": row[0], "name": row[1], "price_cents": row[2]} for row in rows]
    return jsonify(products=products)


@app.get("/products/<int:product_id>")
def show_product(product_id: int) -> Response:
    """Show one product with its stock: from the cache, or from SQL and then cached."""
    key = f"product:{product_id}"
    body: Any = cache.get(key)
    if body is None:
        rows = read(
            "SELECT p.id, p.name, p.price_cents, i.stock FROM products p"
            " JOIN inventory i ON i.product_id = p.id WHERE p.id = %s",
            (product_id,),
        )
        if not rows:
            raise RefusedError(404, f"there is no product {product_id}")
        body = json.dumps(
            dict(zip(("id", "name", "price_cents", "stock"), rows[0], strict=True))
        ).encode()
        cache.set(key, body, ex=CACHE_TTL_SECONDS)
    return Response(body, mimetype="application/json")


@app.post("/checkout")
def checkout() -> tuple[Response, int]:
    """Sell some of one product: stock, order and payment in one transaction, then a job."""
    product_id, quantity = _wanted(request.get_json(silent=True))
    connection = database()
    with connection, connection.cursor() as cursor:
        # Two checkouts of one product wait for each other here, and only here.
        cursor.execute(
            "SELECT i.stock, p.price_cents FROM inventory i JOIN products p ON p.id = i.product_id"
            " WHERE i.product_id = %s FOR UPDATE OF i",
            (product_id,),
        )
        found = cursor.fetchone()
        if found is None:
            raise RefusedError(404, f"there is no product {product_id}")
        stock, price_cents = found
        if stock < quantity:
            raise RefusedError(409, f"out of stock: {stock} left of product {product_id}")
        cursor.execute(
            "UPDATE inventory SET stock = stock - %s WHERE product_id = %s", (quantity, product_id)
        )
        cursor.execute(
            "INSERT INTO orders (product_id, quantity, total_cents)"
            " VALUES (%s, %s, %s) RETURNING id",
            (product_id, quantity, quantity * price_cents),
        )
        (order_id,) = cursor.fetchone() or (None,)
        cursor.execute(
            "INSERT INTO payments (order_id, amount_cents, status) VALUES (%s, %s, 'captured')",
            (order_id, quantity * price_cents),
        )
    job_id = _queue_receipt(order_id, product_id)
    return jsonify(order=order_id, total_cents=quantity * price_cents, job_id=job_id), 201


def _wanted(body: object) -> tuple[int, int]:
    """Check a checkout's JSON and return its product and quantity."""
    if not isinstance(body, dict):
        raise RefusedError(400, 'the body must be JSON such as {"product": 1, "quantity": 2}')
    product_id, quantity = body.get("product"), body.get("quantity")
    # `type(...) is int`, because true and false are ints to isinstance.
    if type(product_id) is not int or type(quantity) is not int:
        raise RefusedError(400, "product and quantity must be whole numbers")
    if not 1 <= quantity <= MAX_QUANTITY:
        raise RefusedError(400, f"quantity must be from 1 to {MAX_QUANTITY}")
    return product_id, quantity


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


@app.get("/orders/<int:order_id>")
def show_order(order_id: int) -> Response:
    """Show one order with its payment."""
    rows = read(
        "SELECT o.id, o.product_id, o.quantity, o.total_cents, o.created_at, p.status"
        " FROM orders o JOIN payments p ON p.order_id = o.id WHERE o.id = %s",
        (order_id,),
    )
    if not rows:
        raise RefusedError(404, f"there is no order {order_id}")
    number, product_id, quantity, total_cents, created_at, payment = rows[0]
    return jsonify(
        order=number,
        product=product_id,
        quantity=quantity,
        total_cents=total_cents,
        created_at=created_at.isoformat(),
        payment=payment,
    )


@app.errorhandler(RefusedError)
def _refused(error: RefusedError) -> tuple[Response, int]:
    return jsonify(error=error.reason), error.status


@app.errorhandler(HTTPException)
def _http_error(error: HTTPException) -> tuple[Response, int]:
    return jsonify(error=error.name.lower()), error.code or 500


@app.errorhandler(psycopg2.OperationalError)
@app.errorhandler(psycopg2.InterfaceError)
@app.errorhandler(redis.RedisError)
def _service_down(error: Exception) -> tuple[Response, int]:
    log.error("%s", error)
    return jsonify(error="a service behind the shop does not answer"), 503
