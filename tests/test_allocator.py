"""Freed memory stays with a worker: page faults counted, in processes as Dask's nannies start them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from daskcell.compute import start_workers
from daskcell.config import ComputeSettings

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's allocator")

ROUNDS = 200
PAGES = 2**20 // os.sysconf("SC_PAGE_SIZE")
"""Of one array below."""


def page_faults() -> int:
    import resource

    import numpy as np

    np.ones(2**20, np.uint8).sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        np.ones(2**20, np.uint8).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
def test_workers_do_not_ask_the_system_for_every_array():
    with start_workers(ComputeSettings(workers=1)) as workers:
        window = workers.window()
        window.submit("faults", page_faults)
        [(_, faults)] = window
    assert faults < ROUNDS * PAGES / 10


def faults_in(code: str, **variables: str) -> int:
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n{code}"
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_it_is_the_cure():
    plain = "import test_allocator; print(test_allocator.page_faults())"
    cured = f"from daskcell.allocator import keep_freed_memory; keep_freed_memory()\n{plain}"
    assert faults_in(plain) > ROUNDS * PAGES / 2
    assert faults_in(cured) < ROUNDS * PAGES / 10


@pytest.mark.slow
def test_what_the_user_set_stays():
    code = "from daskcell.allocator import keep_freed_memory; keep_freed_memory()\n"
    code += "import test_allocator; print(test_allocator.page_faults())"
    assert faults_in(code, MALLOC_MMAP_THRESHOLD_="65536") > ROUNDS * PAGES / 2
