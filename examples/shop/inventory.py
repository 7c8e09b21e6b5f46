"""The service that knows what there is to sell.

With `SHOP_RACE=1` it reserves as one does who has not thought of others: it looks and then writes,
and of two checkouts at one time, one is forgotten.
"""

import os

from answers import find_product, make_app, no_product, sold_out, wanted
from clients import read, transaction
from flask import Response, jsonify, request

RACE = os.environ.get("SHOP_RACE") == "1"

app = make_app(__name__)


@app.get("/health")
def health() -> Response:
    """Answer 200 when PostgreSQL answers."""
    read("SELECT 1")
    return jsonify(status="ok")


@app.get("/products/<int:product_id>")
def show_product(product_id: int) -> Response:
    """Show one product with its stock."""
    return jsonify(find_product(product_id))


@app.post("/reserve")
def reserve() -> Response:
    """Take some of one product from the stock; answers its price."""
    product_id, quantity = wanted(request.get_json(silent=True))
    with transaction() as cursor:
        # Two checkouts of one product wait for each other here, unless they race.
        cursor.execute(
            "SELECT i.stock, p.price_cents FROM inventory i JOIN products p ON p.id = i.product_id"
            " WHERE i.product_id = %s" + ("" if RACE else " FOR UPDATE OF i"),
            (product_id,),
        )
        found = cursor.fetchone()
        if found is None:
            raise no_product(product_id)
        stock, price_cents = found
        if stock < quantity:
            raise sold_out(product_id, stock)
        cursor.execute(
            "UPDATE inventory SET stock = %s WHERE product_id = %s", (stock - quantity, product_id)
        )
    return jsonify(product=product_id, quantity=quantity, price_cents=price_cents)


@app.post("/release")
def release() -> Response:
    """Put back what was reserved and not paid for."""
    product_id, quantity = wanted(request.get_json(silent=True))
    with transaction() as cursor:
        cursor.execute(
            "UPDATE inventory SET stock = stock + %s WHERE product_id = %s", (quantity, product_id)
        )
    return jsonify(product=product_id, quantity=quantity)
