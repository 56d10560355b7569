"""Shared fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real development pictures; tests that ask for it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"the development pictures are not at {DATA}")
    return DATA
