"""Numbers as people read them, for the terminal only: JSON and CSV keep the exact ones."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

_SI_SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_TIMES_NS = ((10**9, "s"), (10**6, "ms"), (10**3, "µs"))


def duration(ns: int) -> str:
    """A duration with three digits and a unit.

    >>> duration(812), duration(12_345_678), duration(61_200_000_000), duration(-5000)
    ('812 ns', '12.3 ms', '61.2 s', '-5.00 µs')
    >>> duration(999_999), duration(4_000 * 10**9)
    ('1.00 ms', '1 h 06 min 40 s')
    """
    if abs(ns) >= 100 * 10**9:
        seconds = round(abs(ns) / 10**9)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        text = f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
        return f"{'-' if ns < 0 else ''}{text} {seconds:02} s"
    return _scaled(ns, _TIMES_NS, "ns")


def size(count: int) -> str:
    """A number of bytes with three digits and a unit.

    >>> size(999), size(1500), size(133_976_381)
    ('999 B', '1.50 kB', '134 MB')
    """
    return _scaled(count, _SI_SIZES, "B")


def _scaled(value: int, units: tuple[tuple[int, str], ...], smallest: str) -> str:
    for factor, unit in units:
        # 999 999 ns rounds to 1.00 ms, not to 1000 µs.
        if abs(value) >= factor * 0.9995:
            number = value / factor
            digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
            return f"{number:.{digits}f} {unit}"
    return f"{value} {smallest}"


def escape_byte(byte: int) -> str:
    r"""How a byte is shown: as within a bytes literal of Python.

    >>> "".join(map(escape_byte, b"GET /\r\n\\\xff"))
    'GET /\\r\\n\\\\\\xff'
    """
    special = {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r", 0x5C: "\\\\"}
    if byte in special:
        return special[byte]
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}"


def printable(text: str) -> str:
    r"""Text of a traced program, fit for a terminal: what could steer that is escaped.

    >>> printable("worker \x1b[2J")
    'worker \\x1b[2J'
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def cut(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis if it is wider.

    >>> cut("gunicorn", 8), cut("gunicorn", 5)
    ('gunicorn', 'guni…')
    """
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def moment(realtime_ns: int) -> datetime | None:
    """A point in time in UTC, from nanoseconds since 1970; None: a clock that was never set.

    >>> moment(1_700_000_000_123_456_789).isoformat(" ", "milliseconds")
    '2023-11-14 22:13:20.123+00:00'
    """
    try:
        return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(
            microseconds=realtime_ns // 1000
        )
    except OverflowError:
        return None
