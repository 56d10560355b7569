"""Scores of results whose truth is known: found cells, and clusters against types.

A found cell is right if it matches a true one, one to one, with an intersection over union (IoU) of at least
a threshold. The numbers of right (TP), surplus (FP) and missed (FN) cells, pooled over images, give
precision, recall, F1 and ``AP = TP / (TP + FP + FN)``, the average precision of the literature on nucleus
segmentation (Caicedo et al., Nature Methods 16 (2019) 1247-1253).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
