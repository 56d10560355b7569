"""Every cell described: where it is, its shape and brightness, and a network's vector of its crop.

    cell_index ──> measurements, textures ─────────────────────────┐
       ├─────────> crops ──> encoders ─────────────┐               ├──> tasks ──┬──> array_tasks, lazy
       └─────────> tiles ──> feature_maps, pooling ┴──> embedders ─┘            └──> engine, writers

A cell is described by the one block that owns its anchor, or the one tile that holds its middle, from pixels
that hold the whole cell, so nothing depends on where the blocks are cut.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
