"""Pixels to cells: exact at every seam.

tiles, rescale, globals      the whole picture's coordinates and facts
network, dynamics            tiles through the network; pixels along the flows
methods                      Cellpose, watershed, or any function of a block
ownership, flowcheck, cells  which cells are a block's own; checks, numbers, painting
lazy, engine, tasks          the two drivers: dask arrays; OME-Zarr on disk, and what its workers do
seams, memory                what the cutting did (it should be nothing), and what a block takes
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
