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

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
