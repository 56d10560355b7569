"""Label images as Cellpose keeps them, for its window and for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.export.registry import Exporter

if TYPE_CHECKING:
    from daskcell.study import Study


def write_seg(study: Study, slides: list[str], path: Path) -> int:
    """Write the cells of a slide as ``<slide>_seg.npy``, as `cellpose.io.masks_flows_to_seg` does.

    A pickled dictionary: ``masks`` and ``outlines`` ``(Y, X)`` uint16, or uint32 for more cells;
    ``filename``, the image that was read; ``ismanual``, ``chan_choose``, ``flows`` (empty: thresholds cannot
    be changed in Cellpose's window). The whole label image is in memory.
    """
    from cellpose.utils import masks_to_outlines

    (slide,) = slides
    masks = np.asarray(study.labels(slide).compute())
    count = int(masks.max(initial=0))
    masks = masks.astype(np.uint16 if count < 1 << 16 else np.uint32)
    files = study.record.ledger(slide).files
    content: Any = {
        "masks": masks,
        "outlines": masks * masks_to_outlines(masks),
        "chan_choose": [0, 0],
        "ismanual": np.zeros(count, bool),
        "filename": files[0]["path"] if files else slide,
        "flows": [],
    }
    with open(path, "wb") as file:
        np.save(file, content, allow_pickle=True)
    return count


EXPORTER = Exporter("_seg.npy", write_seg)
