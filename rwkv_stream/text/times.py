"""Times at the beginning of lines of logs: ISO 8601, syslog's (which have no year), and Apache's."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from rwkv_stream.errors import UsageError

NO_YEAR = 4  # the year of a time without one; it has a 29th of February
_YEAR = timedelta(days=366)
_SEEN = 400  # bytes of a line, in which its time ends
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()  # noqa: SIM905
_CLOCK = rb"(?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d{1,9}))?)?"
_MONTH = rb"(?P<name>[A-Z][a-z]{2})"
_FORMS = tuple(
    re.compile(form)
    for form in (
        # 2026-11-02T10:00:00.5+01:00, [2026-11-02 10:00:00], 2026/11/02 10:00
        rb"[\[(\"']?(?P<year>\d{4})[-/](?P<month>\d\d)[-/](?P<day>\d\d)[T ]"
        + _CLOCK
        + rb" ?(?P<zone>Z|[+-]\d\d:?\d\d)?",
        # Nov  2 10:00:00, <13>Nov  2 10:00:00
        rb"(?:<\d{1,3}>)?" + _MONTH + rb" {1,2}(?P<day>\d{1,2}) " + _CLOCK,
        # 127.0.0.1 - - [02/Nov/2026:10:00:00 +0000]
        rb"\S+ [^\[\"]{0,200}\[(?P<day>\d\d)/" + _MONTH + rb"/(?P<year>\d{4}):" + _CLOCK + rb" (?P<zone>[+-]\d{4})\]",
        # [Mon Nov 02 10:00:00.5 2026]
        rb"\[[A-Z][a-z]{2} " + _MONTH + rb" (?P<day>\d\d) " + _CLOCK + rb" (?P<year>\d{4})\]",
    )
)


def line_time(line: bytes) -> datetime | None:
    """The time that a line begins with, with a zone where it tells one; in NO_YEAR where it tells no year."""
    for form in _FORMS:
        match = form.match(line[:_SEEN])
        if match is None:
            continue
        found = {name: value.decode() for name, value in match.groupdict().items() if value is not None}
        name = found.get("name", "").lower()
        if name and name not in _MONTHS:
            continue
        try:
            return datetime(
                int(found.get("year", NO_YEAR)),
                _MONTHS.index(name) + 1 if name else int(found["month"]),
                int(found["day"]),
                int(found["hour"]),
                int(found["minute"]),
                min(59, int(found.get("second", 0))),  # a leap second is none here
                int(found.get("fraction", "0").ljust(6, "0")[:6]),
                _zone(found.get("zone")),
            )
        except ValueError:
            continue
    return None


def _zone(told: str | None) -> timezone | None:
    if told is None or told == "Z":
        return None if told is None else timezone.utc
    minutes = int(told[1:3]) * 60 + int(told[-2:])
    return timezone(timedelta(minutes=-minutes if told[0] == "-" else minutes))


def asked_time(text: str, asking: str) -> datetime:
    """A time as a person writes it. Raises UsageError for what is none."""
    try:
        return datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith("Z") else text)
    except ValueError:
        raise UsageError(f"{asking}: expected a time such as 2026-11-02T10:00, found '{text:.80}'") from None


def clock(asked: datetime, first: datetime) -> Callable[[datetime], float]:
    """Seconds by which times are compared, in a log whose first time is `first`.

    A time that is asked for without a zone is one of the log's own clock; lines without a zone are UTC for one that has
    it. In a log without years the year that is asked for does not count: times are told by how long after the first
    line they come, a year at most.
    """
    if first.year == NO_YEAR:
        start = first.replace(tzinfo=None)
        return lambda time: ((time.replace(year=NO_YEAR, tzinfo=None) - start) % _YEAR).total_seconds()
    is_local = asked.tzinfo is None
    return lambda time: (time.replace(tzinfo=timezone.utc) if is_local or time.tzinfo is None else time).timestamp()
