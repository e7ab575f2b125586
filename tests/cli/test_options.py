"""Values that options take as people write them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import click
import pytest

from rwkv_stream.cli.options import age


def test_ages_and_moments() -> None:
    now = datetime.now(timezone.utc)
    for text, ago in (("12h", timedelta(hours=12)), ("30 D", timedelta(days=30)), ("8w", timedelta(weeks=8))):
        assert timedelta() <= age(text) - (now - ago) < timedelta(minutes=10)
    assert age("2026-11-02") == datetime(2026, 11, 2, tzinfo=timezone.utc)
    assert age("2026-11-02T10:00:00Z") == datetime(2026, 11, 2, 10, tzinfo=timezone.utc)
    assert age("2026-11-02T10:00+02:00") == datetime(2026, 11, 2, 8, tzinfo=timezone.utc)


@pytest.mark.parametrize("wrong", ["", "soon", "30", "d", "-3d", "999999w", "2026-13-01"])
def test_what_is_no_age(wrong: str) -> None:
    with pytest.raises(click.BadParameter, match="expected an age such as 30d"):
        age(wrong)
