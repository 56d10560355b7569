"""What the colours mean, beside the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def add_legend(
    picture: np.ndarray, palette: np.ndarray, counts: np.ndarray, names: Sequence[str] | None = None
) -> np.ndarray:
    """The picture with a panel to its right: colour, name and number of cells of every cluster.

    As many rows as there is room for; a picture too low for three is made higher.
    """
    from PIL import Image, ImageDraw, ImageFont

    height = picture.shape[0]
    text = int(np.clip(height / 45, 13, 64))
    row = int(1.7 * text)
    k = len(palette)
    wanted = (k + 1) * row
    if height < wanted:
        text = max(11, int(height / (k + 1) / 1.7))
        row = int(1.7 * text)
    height = max(height, min(wanted, (k + 1) * row) if k <= 30 else 3 * row)
    font = ImageFont.load_default(text)
    lines = [f"{names[i] if names else f'cluster {i}'}: {int(counts[i]):,}" for i in range(k)]
    room = max(1, height // row - 1)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"and {k - room + 1} more"]
    width = int(max([font.getlength(line) for line in lines] or [0])) + 3 * row
    panel = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(panel)
    for i, line in enumerate(lines):
        y = row // 2 + i * row
        if not line.startswith("and ") or i < room - 1:
            draw.rectangle((row // 2, y + 2, row // 2 + text, y + 2 + text), fill=tuple(palette[i].tolist()))
        draw.text((row // 2 + int(1.5 * text), y), line, fill=(235, 235, 235), font=font)
    out = np.zeros((height, picture.shape[1] + width, 3), np.uint8)
    out[: picture.shape[0], : picture.shape[1]] = picture
    out[:, picture.shape[1] :] = np.asarray(panel)
    return out
