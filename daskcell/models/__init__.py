"""Embedded networks, and the registry of weights.

Names are imported on first use: none of them costs the import of torch before it is needed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
