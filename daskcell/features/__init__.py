"""Every cell described: where it is, its shape and brightness, and a network's vector of its picture.

    objects ──> measurements, textures ──────────────────┐
       ├──────> crops ──> encoders ────────┐             ├──> lazy (arrays in, table or array out)
       └──────> tiles ──> stages, pooling ─┴─> vectors ──┴──> engine, files (OME-Zarr in, files out), export

A cell is described by the one block that owns its anchor, or the one tile that holds its middle, from pixels
that hold the whole cell, so nothing depends on where the blocks are cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskcell.features.lazy import embed, measure

__all__ = ["embed", "measure"]


def __getattr__(name: str) -> Any:
    # torch and pandas are slow to import: only when asked for.
    if name in __all__:
        from daskcell.features import lazy

        return getattr(lazy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
