"""Reading any microscope file, telling channels apart, and OME-Zarr on disk, where all stages meet."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
