"""A block that does not fit a worker is refused with one that does."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tifffile

from daskcell import run
from daskcell.errors import ComputeError
from daskcell.segmentation.memory import needed_memory, refuse_too_little_memory


@pytest.mark.parametrize("block", [512, 2048, 4096, 8192])
def test_the_block_that_is_named_fits_and_the_next_does_not(block):
    refuse_too_little_memory(None, block)
    refuse_too_little_memory(needed_memory(block), block)
    with pytest.raises(ComputeError, match=f"blocks of {block} pixels need") as refusal:
        refuse_too_little_memory(needed_memory(block) - 1, block)
    named = int(re.search(r"compute.block to (\d+)", str(refusal.value))[1])
    assert named < block
    refuse_too_little_memory(needed_memory(block) - 1, named)
    assert needed_memory(named + 256) > needed_memory(block) - 1


def test_memory_that_fits_no_block_asks_for_more():
    with pytest.raises(ComputeError, match=r"Please raise compute.memory to 1.08 GiB"):
        refuse_too_little_memory(300 * 2**20, 2048)


def test_a_run_is_refused_before_any_work(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8))
    config = {"compute": {"workers": 1, "memory": "1GiB", "block": 4096}}
    with pytest.raises(ComputeError, match=r"has 1.00 GiB of memory, .*compute.block to 1536 or less"):
        run(tmp_path / "a.tif", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
