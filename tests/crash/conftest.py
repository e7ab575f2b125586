from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-moments", action="store_true", help="every seeded kill, not the first few")
