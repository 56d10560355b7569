"""Preprocessing: even light, stains, colour image, histogram adjustment, Gaussian filter.

colors, dtypes       colours of stains and their mixing; pixel types
steps, coarse_grid   the arithmetic of each step; a coarse grid over the image
background, stains   steps that even out light, and that change the stains of a slide
statistics, clahe    statistics of the whole image, counted block by block
signal               padding, background and cells in these counts
plan                 all steps of one image, and `apply_block`
prepared             an image and its plan, read box by box: `PreparedImage`
block_stats, fit     reading an image for its statistics; from settings to a plan: `fit_plan`, `fit_slide`
flatfield            the flat field of a camera, from many images
dask_graph, lazy     the same on dask arrays: `reconstruct`, `adjust_histogram`, `gaussian`, ...
export               the preprocessed image as a TIFF
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
