"""Pixels to cells: exact at every seam.

methods        ways to find cells: Cellpose, the watershed, any function, what other packages install
core           what makes blocks exact: global tiles, dynamics, ownership, checks, painting
image_params, network, diameter, tissue    of Cellpose: facts of the whole image, tiles, network outputs
blocks         the work on one block, on arrays
lazy           `segment`: that work as a graph over a Dask array
engine, tasks  `segment_slide`: the same over a study, with files between the tasks
index, memory  where each label is; what a block takes of a worker's memory
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
