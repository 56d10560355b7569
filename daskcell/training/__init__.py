"""Training of the embedded networks: the segmenter on images and masks, the encoder on crops of a study.

segmenter_data, smears ──> augment ──> segmenter ──┐
                           crops ────> encoder ────┴──> trainer (schedule, checkpoints, early stop)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
