"""How good a result is, where the truth is known: found cells, and cells grouped by type.

A found cell is right when it overlaps a true one by an intersection over union (IoU) of at least a
threshold, one to one. From the right (TP), surplus (FP) and missed (FN) cells, pooled over pictures: ``AP =
TP / (TP + FP + FN)``, the average precision of the nucleus segmentation literature (Caicedo et al., Nature
Methods 16 (2019) 1247-1253), and precision, recall and F1.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
