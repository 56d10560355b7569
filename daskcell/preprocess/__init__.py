"""Preprocessing: even light, stains, colour picture, histogram adjustment, Gaussian filter.

colors, pixels       colours of stains and their mixing; pixel types
steps, lattice       the arithmetic of each step, with frozen numbers; a coarse grid over the image
background, stains   steps that even out light, and that change the stains of a slide
statistics, clahe    global statistics, counted block by block
plan                 all steps of one image, frozen, and `apply_block`
prepared             an image and its plan, read box by box: `PreparedImage`
surveys, freezing    reading an image for its statistics; from settings to a plan: `freeze`, `freeze_slide`
flat                 the flat field of a camera, from many pictures
graphs, lazy         the same on dask arrays: `reconstruct`, `adjust_histogram`, `gaussian`, ...
export               the preprocessed image as a TIFF
"""

from __future__ import annotations

from daskcell.preprocess.colors import auto_colors
from daskcell.preprocess.export import write_prepared_tiff
from daskcell.preprocess.fit import freeze, freeze_slide
from daskcell.preprocess.flatfield import estimate_flat
from daskcell.preprocess.lazy import (
    adjust_histogram,
    adjust_stains,
    correct_background,
    gaussian,
    prepare,
    reconstruct,
)
from daskcell.preprocess.plan import Plan, apply_block
from daskcell.preprocess.prepared import PreparedArray, PreparedImage

__all__ = [
    "Plan",
    "PreparedArray",
    "PreparedImage",
    "adjust_histogram",
    "adjust_stains",
    "apply_block",
    "auto_colors",
    "correct_background",
    "estimate_flat",
    "freeze",
    "freeze_slide",
    "gaussian",
    "prepare",
    "reconstruct",
    "write_prepared_tiff",
]
