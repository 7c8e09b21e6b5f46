"""All protocols that are recognised."""

from __future__ import annotations

from typing import Final

from scope_ebpf.protocols import dns, http, memcached, mysql, postgresql, redis
from scope_ebpf.protocols.contract import Protocol

# In this order they are asked about a connection that is not known yet.
PROTOCOLS: Final[tuple[Protocol, ...]] = (
    http.PROTOCOL,
    postgresql.PROTOCOL,
    redis.PROTOCOL,
    mysql.PROTOCOL,
    memcached.PROTOCOL,
    dns.PROTOCOL,
)
