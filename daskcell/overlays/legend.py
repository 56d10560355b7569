"""What the colours mean, beside the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def titled(names: Sequence[str | None] | None, k: int) -> list[tuple[int, str]]:
    """Number and name of the clusters that are shown; a name that is None belongs to one shown as another."""
    if names is None:
        names = [f"cluster {i}" for i in range(k)]
    return [(i, name) for i, name in enumerate(names) if name is not None]


def add_legend(
    picture: np.ndarray,
    palette: np.ndarray,
    counts: np.ndarray,
    names: Sequence[str | None] | None = None,
) -> np.ndarray:
    """The picture with a panel to its right: colour, name and number of cells of every cluster.

    A cluster whose name is None is left out: it is shown as another. As many rows as there is room for; a
    picture too low for three is made higher.
    """
    from PIL import Image, ImageDraw, ImageFont

    height = picture.shape[0]
    text = int(np.clip(height / 45, 13, 64))
    row = int(1.7 * text)
    titles = titled(names, len(palette))
    k = len(titles)
    wanted = (k + 1) * row
    if height < wanted:
        text = max(11, int(height / (k + 1) / 1.7))
        row = int(1.7 * text)
    height = max(height, min(wanted, (k + 1) * row) if k <= 30 else 3 * row)
    font = ImageFont.load_default(text)
    lines = [f"{title}: {int(counts[i]):,}" for i, title in titles]
    room = max(1, height // row - 1)
    cut = len(lines) > room
    if cut:
        lines = [*lines[: room - 1], f"and {k - room + 1} more"]
    width = int(max([font.getlength(line) for line in lines] or [0])) + 3 * row
    panel = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(panel)
    for i, line in enumerate(lines):
        y = row // 2 + i * row
        if not cut or i < room - 1:
            color = tuple(palette[titles[i][0]].tolist())
            draw.rectangle((row // 2, y + 2, row // 2 + text, y + 2 + text), fill=color)
        draw.text((row // 2 + int(1.5 * text), y), line, fill=(235, 235, 235), font=font)
    out = np.zeros((height, picture.shape[1] + width, 3), np.uint8)
    out[: picture.shape[0], : picture.shape[1]] = picture
    out[:, picture.shape[1] :] = np.asarray(panel)
    return out
