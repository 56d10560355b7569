"""Colours of stains, and the colour image mixed from them.

Covers names, the choice of colours from channel names, and the mixing of one block. Knows neither Dask nor
files.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence

import numpy as np

from daskcell.errors import InputError
from daskcell.preprocess.dtypes import is_small, to_dtype

# Light of a stain: full red, green, blue. CSS's "green" is half as bright (#008000), which would dim a
# channel.
_STAINS = {
    "red": "#ff0000",
    "green": "#00ff00",
    "blue": "#0000ff",
    "cyan": "#00ffff",
    "magenta": "#ff00ff",
    "yellow": "#ffff00",
    "white": "#ffffff",
}
_LETTERS = {
    "r": "red",
    "g": "green",
    "b": "blue",
    "c": "cyan",
    "m": "magenta",
    "y": "yellow",
    "w": "white",
    "k": "black",
}
_TABLEAU = {
    "tab:blue": "#1f77b4",
    "tab:orange": "#ff7f0e",
    "tab:green": "#2ca02c",
    "tab:red": "#d62728",
    "tab:purple": "#9467bd",
    "tab:brown": "#8c564b",
    "tab:pink": "#e377c2",
    "tab:gray": "#7f7f7f",
    "tab:grey": "#7f7f7f",
    "tab:olive": "#bcbd22",
    "tab:cyan": "#17becf",
}

SEQUENCE = ("red", "green", "blue", "cyan", "magenta", "yellow")
"""Colours given in turn to channels whose names say nothing."""

# The first pattern found in a channel's name decides. Words are matched as words: "red" is not in "infrared".
_BY_NAME = (
    (r"cyan|cfp|ecfp|cerulean|c", "cyan"),
    (r"magenta|cy5|cy5\.5|(?:alexa(?: fluor)?|af) ?6\d\d|draq5|far ?red|m", "magenta"),
    (r"yellow|yfp|eyfp|venus|y", "yellow"),
    (r"blue|dapi|hoechst\d*|dna|nucle\w*|bfp|b", "blue"),
    (r"green|gfp|egfp|fitc|(?:alexa(?: fluor)?|af) ?488|syto\d*|cy2|g", "green"),
    (
        r"red|tritc|rhodamine|rfp|mcherry|cherry|tdtomato|texas ?red|(?:alexa(?: fluor)?|af) ?5\d\d|cy3|r",
        "red",
    ),
    (r"bright ?field|bf|phase|dic|trans\w*|tl", "white"),
)


def color_rgb(color: str) -> tuple[float, float, float]:
    """Red, green and blue (0-1) of a colour: any matplotlib name, ``"#rrggbb"``, ``"#rgb"`` or a grey
    ``"0.5"``.

    ``"green"`` is full green, ``(0, 1, 0)``, as microscopes show it, not CSS's half-bright ``#008000``.

    Raises
    ------
    InputError
        For a colour nobody knows.
    """
    name = color.strip().lower() if isinstance(color, str) else ""
    name = _LETTERS.get(name, name)
    text = _STAINS.get(name) or _TABLEAU.get(name) or name
    short = re.fullmatch(r"#([0-9a-f])([0-9a-f])([0-9a-f])", text)
    if short:
        text = "#" + "".join(2 * digit for digit in short.groups())
    if re.fullmatch(r"#[0-9a-f]{6}", text):
        return int(text[1:3], 16) / 255, int(text[3:5], 16) / 255, int(text[5:7], 16) / 255
    if re.fullmatch(r"0?\.\d+|[01]\.?0*", text):
        return (float(text),) * 3
    named = _css(text) if re.fullmatch(r"[a-z]+", text) else _xkcd(text)
    if named is None:
        raise InputError(f"Unknown color {color!r}: give a matplotlib name such as 'cyan', or '#00ffff'.")
    return named


def _css(name: str) -> tuple[float, float, float] | None:
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError:
        return None
    return red / 255, green / 255, blue / 255


def _xkcd(name: str) -> tuple[float, float, float] | None:
    """The names only matplotlib has (``xkcd:``), where matplotlib is installed."""
    try:
        from matplotlib.colors import to_rgb

        return to_rgb(name)
    except (ImportError, ValueError):
        return None


def auto_colors(channels: Sequence[str]) -> list[str]:
    """A colour for each channel: by its name where that says something, else the next unused of `SEQUENCE`.

    No two channels get the same colour.

    >>> auto_colors(["DAPI", "FITC", "actin"])
    ['blue', 'green', 'red']
    """
    colors: list[str | None] = [None] * len(channels)
    for i, channel in enumerate(channels):
        words = " ".join(re.findall(r"[a-z0-9.]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", channel).lower()))
        for pattern, color in _BY_NAME:
            if re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", words):
                if color not in colors:
                    colors[i] = color
                break
    spare = [color for color in SEQUENCE if color not in colors]
    missing = [i for i, color in enumerate(colors) if color is None]
    # Beyond six: hues between the six, which nothing above can have given.
    extra = max(len(missing) - len(spare), 0)
    for i in range(extra):
        red, green, blue = colorsys.hsv_to_rgb((i + 0.5) / extra, 0.6, 1.0)
        spare.append(f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}")
    for i, color in zip(missing, spare, strict=False):
        colors[i] = color
    return [color for color in colors if color is not None]


def mixing_weights(
    count: int, colors: Sequence[str], ratio: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """How much of each of `count` channels goes to red, green and blue: three rows of `count` weights.

    Raises
    ------
    InputError
        For an unknown colour, a ratio below 0 or not a number, or a count that does not fit the channels.
    """
    if isinstance(colors, str):
        colors = [colors]
    if len(colors) != count:
        raise InputError(
            f"The image has {count} channel(s), but {len(colors)} color(s) are given "
            f"({', '.join(map(str, colors))}): give one color a channel."
        )
    if len(ratio) != count:
        raise InputError(
            f"The image has {count} channel(s), but the ratio {tuple(ratio)} has {len(ratio)} value(s)."
        )
    for value in ratio:
        if not _is_ratio(value):
            raise InputError(f"The ratio {value!r} cannot be used: it must be a number of 0 or more.")
    rows = zip(
        *(tuple(float(r) * part for part in color_rgb(c)) for c, r in zip(colors, ratio, strict=True)),
        strict=True,
    )
    return tuple(rows)  # type: ignore[return-value]


def _is_ratio(value: object) -> bool:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return math.isfinite(number) and number >= 0


def _sum_dtype(dtype: np.dtype, parts: list[tuple[np.ndarray, float]]) -> type[np.floating]:
    """The type weighted sums are made in. Plain sums of small integers are exact in float32, and faster."""
    if dtype.kind == "f":
        return dtype.type
    plain = is_small(dtype) and len(parts) < 256 and all(weight == 1 for _, weight in parts)
    return np.float32 if plain else np.float64


def mix(block: np.ndarray, weights: Sequence[Sequence[float]]) -> np.ndarray:
    """Weighted sums of channels: ``(C, h, w)`` to ``(3, h, w)`` of the same dtype.

    Integers are summed in float64, rounded to nearest (ties to even) and cut at what the dtype holds; floats
    are summed in their own precision and not cut.
    """
    out = np.zeros((len(weights), *block.shape[1:]), block.dtype)
    for target, row in zip(out, weights, strict=True):
        parts = [(channel, weight) for channel, weight in zip(block, row, strict=True) if weight]
        if len(parts) == 1 and parts[0][1] == 1:
            target[...] = parts[0][0]
        elif parts:
            exact = _sum_dtype(block.dtype, parts)
            # One multiplication and one addition a pixel and channel, in channel order: no BLAS, whose order
            # of summation, and so last bit, depends on the size of the block.
            total = parts[0][0] * exact(parts[0][1])
            for channel, weight in parts[1:]:
                total += channel * exact(weight)
            target[...] = to_dtype(total, block.dtype)
    return out
