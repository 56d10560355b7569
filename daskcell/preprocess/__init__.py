"""Preprocessing: colour picture from stains, histogram adjustment, Gaussian filter.

colors, pixels       colours of stains and their mixing; pixel types
statistics, clahe    global statistics, counted block by block
steps                the arithmetic of each step, with frozen numbers
plan                 all steps of one image, frozen, and `apply_block`
freezing             how a plan comes about: `freeze`, `freeze_slide`
lazy                 the same on dask arrays: `reconstruct`, `adjust_histogram`, `gaussian`
"""

from daskcell.preprocess.colors import auto_colors
from daskcell.preprocess.export import preprocess_slide_to_tiff
from daskcell.preprocess.freezing import freeze, freeze_slide
from daskcell.preprocess.lazy import adjust_histogram, gaussian, preprocess, reconstruct
from daskcell.preprocess.plan import Plan, apply_block

__all__ = [
    "Plan",
    "adjust_histogram",
    "apply_block",
    "auto_colors",
    "freeze",
    "freeze_slide",
    "gaussian",
    "preprocess",
    "preprocess_slide_to_tiff",
    "reconstruct",
]
