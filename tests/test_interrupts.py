"""Signals stop a program wherever it is, and are never lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_stream.errors import StoppedError
from rwkv_stream.interrupts import SIGNALS, Interruption, StopRequest, blocked, handlers_kept, install


@pytest.fixture
def installed() -> Iterator[None]:
    numbers = (*SIGNALS, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("installed")
def test_a_signal_raises_what_no_handler_of_failures_catches(number: signal.Signals) -> None:
    with pytest.raises(Interruption, match=number.name) as caught:
        try:
            signal.raise_signal(number)
        except Exception:  # noqa: BLE001
            pytest.fail("taken for a failure")
    assert caught.value.signal_number == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_within_an_import_waits_for_its_end(number: signal.Signals, tmp_path: Path) -> None:
    """As torch's extension does, the module swallows what is raised in it."""
    (tmp_path / "greedy.py").write_text(
        "import signal\n"
        "try:\n"
        f"    signal.raise_signal({int(number)})\n"
        "    for _ in range(10): pass\n"
        "except BaseException: print('swallowed')\n"
        "print('whole')\n"
    )
    code = (
        "import sys, time; from rwkv_stream import interrupts\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "interrupts.install()\n"
        "try:\n"
        "    import greedy\n"
        "    time.sleep(60)\n"
        "except interrupts.Interruption as stop: print(stop, time.monotonic() < float(sys.argv[2]))\n"
    )
    arguments = [str(tmp_path), str(time.monotonic() + 30)]
    ended = subprocess.run([sys.executable, "-Ic", code, *arguments], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["whole", number.name, "True"]
    assert ended.stderr == ""


@pytest.mark.usefixtures("installed")
def test_a_signal_within_a_finalizer_is_not_lost() -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            deadline = time.monotonic() + 0.1
            while time.monotonic() < deadline:
                pass

    with pytest.raises(Interruption):
        Dying()
        time.sleep(30)


@pytest.mark.usefixtures("installed")
def test_a_request_receives_signals_and_ends_a_wait() -> None:
    stop = StopRequest()
    with stop.receiving():
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(StoppedError) as caught, stop.waiting():
            pytest.fail("asked to stop before")
    assert caught.value.exit_code == 143
    with pytest.raises(Interruption):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("makes", ["nothing", "an error"])
def test_whatever_a_wait_makes_of_a_signal(makes: str) -> None:
    stop = StopRequest()

    def items() -> Iterator[int]:
        yield 1
        try:
            signal.raise_signal(signal.SIGINT)
        except Interruption:
            if makes == "an error":
                raise ValueError("damaged") from None
        yield 2

    found = []
    with stop.receiving(), pytest.raises(StoppedError) as caught:
        found.extend(stop.guard(items()))
    assert caught.value.exit_code == 130


def test_blocked_signals_wait() -> None:
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with blocked():
            signal.raise_signal(signal.SIGTERM)
            assert received == []
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_handlers_kept() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with handlers_kept():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    assert [signal.getsignal(number) for number in SIGNALS] == before
