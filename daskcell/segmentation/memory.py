"""What a block takes of a worker's memory, so that one with too little is told before any work."""

from __future__ import annotations

from daskcell.errors import ComputeError

PROCESS = 800 * 2**20
"""Bytes of a worker that has loaded torch and a small network."""
PER_PIXEL = 64
"""Bytes per pixel of a block and its halo where all is foreground (measured: 55)."""
HALO = 100
SMALLEST, STEP = 256, 256


def needed_memory(block: int) -> int:
    """Bytes a worker should have for blocks of `block` pixels a side."""
    return PROCESS + PER_PIXEL * (block + 2 * HALO) ** 2


def refuse_too_little_memory(limit: int | None, block: int) -> None:
    """Raise `ComputeError` if `limit` bytes (None: any number) are too few for blocks of `block` pixels."""
    if limit is None or limit >= needed_memory(block):
        return
    has, needs = f"{limit / 2**30:.2f} GiB", f"{needed_memory(block) / 2**30:.2f} GiB"
    fitting = [side for side in range(SMALLEST, block, STEP) if needed_memory(side) <= limit]
    advice = f"set compute.block to {fitting[-1]} or less, or " if fitting else ""
    raise ComputeError(
        f"A worker has {has} of memory, and blocks of {block} pixels need {needs}. Please {advice}"
        f"raise compute.memory to {needs} or more (fewer workers leave more for each)."
    )
