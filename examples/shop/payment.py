"""The service that takes the money."""

from answers import RefusedError, make_app
from clients import read
from flask import Response, jsonify, request

app = make_app(__name__)


@app.get("/health")
def health() -> Response:
    """Answer 200 when PostgreSQL answers."""
    read("SELECT 1")
    return jsonify(status="ok")


@app.post("/payments")
def take_payment() -> tuple[Response, int]:
    """Note a payment, whose order comes later; answers its number."""
    body = request.get_json(silent=True)
    amount_cents = body.get("amount_cents") if isinstance(body, dict) else None
    if type(amount_cents) is not int or amount_cents <= 0:
        raise RefusedError(400, "amount_cents must be a whole number above 0")
    rows = read(
        "INSERT INTO payments (amount_cents, status) VALUES (%s, 'captured') RETURNING id",
        (amount_cents,),
    )
    return jsonify(payment=rows[0][0], amount_cents=amount_cents), 201
