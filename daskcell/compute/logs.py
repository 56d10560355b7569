"""Dask's own log lines: what a user should know is said by daskcell."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_NAMES = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
"""Those below the first have levels of their own in Dask's settings."""
_before: dict[str, int] = {}
_users = 0
_lock = threading.Lock()


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Dask's log lines off in this process, and as they were once everybody has left."""
    import distributed  # noqa: F401  (sets its own levels when it is imported)

    global _users
    with _lock:
        if not _users:
            _before.update({name: logging.getLogger(name).level for name in _NAMES})
        _users += 1
        for name in _NAMES:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            for name, level in () if _users else _before.items():
                logging.getLogger(name).setLevel(level)
