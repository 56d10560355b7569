"""What a block takes of a worker's memory, so that too little is refused before any work."""

from __future__ import annotations

from daskcell.config import SegmentSettings
from daskcell.errors import ComputeError

PROCESS = 800 * 2**20
"""Bytes of a worker that has loaded torch and a small network."""
PER_PIXEL = 64
"""Bytes per pixel of a block and its halo where all is foreground (measured: 54)."""
PER_WEIGHT = 1.6
"""Bytes per byte of a larger network's file, while it is loaded and runs (Cellpose-SAM: 1.4 to 1.6)."""
HALO = 96
"""Pixels that Cellpose and the watershed look at around a block, at least."""
SMALLEST, STEP = 256, 256


def needed_memory(block: int, weights: int = 0, halo: int = HALO) -> int:
    """Bytes of memory that a worker should have.

    Parameters
    ----------
    block : int
        Side of the blocks in pixels.
    weights : int
        Bytes of the files of the networks it loads.
    halo : int
        Pixels around a block that the method looks at first (`settings_halo`).
    """
    return PROCESS + int(PER_WEIGHT * weights) + PER_PIXEL * (block + 2 * halo) ** 2


def settings_halo(settings: SegmentSettings) -> int:
    """Pixels around a block that the method of `settings` looks at first.

    A diameter that is measured is not known yet; it is taken for the usual one.
    """
    from daskcell.segmentation.methods import make_method

    return make_method(settings.method, settings).halo


def refuse_too_little_memory(
    limit: int | None,
    block: int,
    weights: int = 0,
    setting: str = "compute.memory",
    halo: int = HALO,
) -> None:
    """Raise `ComputeError` if `limit` bytes (None: any number) are too few for blocks of `block` pixels.

    `setting` is the name of the setting that says how many there are, for the sentence.
    """
    needed = needed_memory(block, weights, halo)
    if limit is None or limit >= needed:
        return
    has, needs = f"{limit / 2**30:.2f} GiB", f"{needed / 2**30:.2f} GiB"
    fitting = [side for side in range(SMALLEST, block, STEP) if needed_memory(side, weights, halo) <= limit]
    advice = f"set compute.block to {fitting[-1]} or less, or " if fitting else ""
    fewer = " (fewer workers leave more for each)" if setting == "compute.memory" else ""
    raise ComputeError(
        f"A worker has {has} of memory, and blocks of {block} pixels "
        f"{'and the networks ' if weights > PROCESS // 10 else ''}need {needs}. Please {advice}"
        f"raise {setting} to {needs} or more{fewer}."
    )
