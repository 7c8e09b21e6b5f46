"""What `rq worker --config rq_settings` reads: where Redis is, and what to work on."""

import os

# Imported once here, so that not every forked work horse has to.
import mail  # noqa: F401
import otel

if otel.ON:
    otel.instrument()

REDIS_URL = os.environ["SHOP_REDIS_URL"]
QUEUES = ["mail"]
