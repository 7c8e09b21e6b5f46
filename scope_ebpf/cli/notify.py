"""What systemd is told of a recording that it started: sd_notify(3), without a library."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress

from scope_ebpf.recorder import Status

STATUS_SECONDS = 5.0


class Notifier:
    """Tells the service manager where a recording stands; does nothing if none asks."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """The address is in $NOTIFY_SOCKET; one that begins with @ is abstract."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._next = 0.0

    @property
    def wanted(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def ready(self, text: str) -> None:
        """The probes are at work."""
        self._send(f"READY=1\nSTATUS={text}\nMAINPID={os.getpid()}")

    def show(self, status: Status) -> None:
        """Where the recording stands, for `systemctl status`; it also says that the recorder is alive."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + STATUS_SECONDS
        rows = sum(status.rows.values())
        self._send(
            f"WATCHDOG=1\nSTATUS={status.seconds:.0f} s, {rows:,} rows, lost {status.lost:,},"
            f" {status.bytes_on_disk / 1e6:,.1f} MB, CPU {status.cpu_percent:.1f} %"
        )

    def stopping(self) -> None:
        """The recording ends."""
        self._send("STOPPING=1\nSTATUS=writing the end of the recording")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        import socket  # most recordings have nobody to tell

        # a manager that is gone must not end a recording
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(text.encode(), self._address)
