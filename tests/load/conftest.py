"""Tests here run only where ECDCTR_TEST_LOAD is set: `make test-load`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("ECDCTR_TEST_LOAD"):
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="load tests run by make test-load"))
