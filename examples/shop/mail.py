"""The job that the RQ worker runs for each order: its mail, which ends in a table."""

import otel
import truth
from clients import read, transaction


def send_order_mail(order_id: int, **cause: str) -> str:
    """Write the mail of an order from its rows; returns its subject.

    Real but for the last step: what would go to a mail server becomes a row of `mails`. `cause` is
    of the request that queued the job, and only there when truth.py is on.
    """
    with otel.job("send_order_mail"), truth.job("send_order_mail", **cause):
        rows = read(
            "SELECT p.name, o.quantity, o.total_cents FROM orders o"
            " JOIN products p ON p.id = o.product_id WHERE o.id = %s",
            (order_id,),
        )
        if not rows:
            raise ValueError(f"there is no order {order_id} to send a mail about")
        name, quantity, total_cents = rows[0]
        subject = f"Your order {order_id}: {quantity} × {name}"
        text = f"{subject}\nTotal: {total_cents / 100:.2f} €\n"
        with transaction() as cursor:
            cursor.execute(
                "INSERT INTO mails (order_id, subject, body) VALUES (%s, %s, %s)",
                (order_id, subject, text),
            )
    return subject
