"""Training of the embedded networks: the segmenter on images and masks, the encoder on crops of a study.

segmenter_data, smears ──> augment ──> segmenter ──┐
                           crops ────> encoder ────┴──> trainer (schedule, checkpoints, early stop)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskcell.training.encoder import EncoderRecipe, train_encoder
    from daskcell.training.segmenter import Recipe, train_segmenter

_HOME = {
    "EncoderRecipe": "encoder",
    "Recipe": "segmenter",
    "train_encoder": "encoder",
    "train_segmenter": "segmenter",
}
__all__ = ["EncoderRecipe", "Recipe", "train_encoder", "train_segmenter"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
