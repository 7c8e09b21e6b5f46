"""What all services of the shop have in common: errors as JSON, and pages that only need SQL."""

import logging

import otel
import psycopg2
import redis
import requests
import truth
from clients import read
from flask import Blueprint, Flask, Response, jsonify
from werkzeug.exceptions import HTTPException

LIST_LIMIT = 50
MAX_QUANTITY = 100

log = logging.getLogger("shop")
pages = Blueprint("pages", __name__)


class RefusedError(Exception):
    """A request that the shop answers with an error: the HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def make_app(name: str) -> Flask:
    """Make a service's app, which answers every error with JSON."""
    app = Flask(name)
    app.register_error_handler(RefusedError, _refused)
    app.register_error_handler(HTTPException, _http_error)
    for error in (
        psycopg2.OperationalError,
        psycopg2.InterfaceError,
        redis.RedisError,
        requests.RequestException,
    ):
        app.register_error_handler(error, _service_down)
    if otel.ON:
        otel.instrument(app)
    if truth.ON:
        app.wsgi_app = truth.Middleware(app.wsgi_app)  # type: ignore[method-assign]
    return app


def wanted(body: object) -> tuple[int, int]:
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


def no_product(product_id: int) -> RefusedError:
    """The answer about a product that there is not."""
    return RefusedError(404, f"there is no product {product_id}")


def sold_out(product_id: int, stock: int) -> RefusedError:
    """The answer to who wants more than there is."""
    return RefusedError(409, f"out of stock: {stock} left of product {product_id}")


def find_product(product_id: int) -> dict[str, object]:
    """Read one product with its stock; refuses a product that there is not."""
    rows = read(
        "SELECT p.id, p.name, p.price_cents, i.stock FROM products p"
        " JOIN inventory i ON i.product_id = p.id WHERE p.id = %s",
        (product_id,),
    )
    if not rows:
        raise no_product(product_id)
    return dict(zip(("id", "name", "price_cents", "stock"), rows[0], strict=True))


@pages.get("/products")
def list_products() -> Response:
    """List the first products; always from SQL."""
    rows = read("SELECT id, name, price_cents FROM products ORDER BY id LIMIT %s", (LIST_LIMIT,))
    products = [{"id": row[0], "name": row[1], "price_cents": row[2]} for row in rows]
    return jsonify(products=products)


@pages.get("/orders/<int:order_id>")
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


def _refused(error: RefusedError) -> tuple[Response, int]:
    return jsonify(error=error.reason), error.status


def _http_error(error: HTTPException) -> tuple[Response, int]:
    return jsonify(error=error.name.lower()), error.code or 500


def _service_down(error: Exception) -> tuple[Response, int]:
    log.error("%s", error)
    return jsonify(error="a service behind the shop does not answer"), 503
