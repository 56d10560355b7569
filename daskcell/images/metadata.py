"""The metadata of an OME-Zarr 0.5 image, built and checked with ome-zarr-models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zarr

from daskcell.images import store

_COLOURS = {
    "red": "FF0000",
    "green": "00FF00",
    "blue": "0000FF",
    "cyan": "00FFFF",
    "magenta": "FF00FF",
    "yellow": "FFFF00",
    "r": "FF0000",
    "g": "00FF00",
    "b": "0000FF",
    "dapi": "0000FF",
    "hoechst": "0000FF",
    "dna": "0000FF",
    "d": "0000FF",
    "fitc": "00FF00",
    "f": "00FF00",
    "gfp": "00FF00",
    "rfp": "FF0000",
    "tritc": "FF0000",
    "rhodamine": "FF0000",
    "cy5": "FF00FF",
}
_CYCLE = ("FF0000", "00FF00", "0000FF", "00FFFF", "FF00FF", "FFFF00", "FFFFFF")


@dataclass(frozen=True)
class Header:
    """What is known of an image besides its pixels."""

    name: str
    channels: tuple[str, ...]
    pixel_size: tuple[float, float] | None
    is_rgb: bool


def channel_colors(channels: Sequence[str]) -> list[str]:
    """A display colour ``RRGGBB`` for each channel: by name where all are known and differ."""
    if len(channels) == 1:
        return [_COLOURS.get(channels[0].lower(), "FFFFFF")]
    known = [_COLOURS.get(name.lower()) for name in channels]
    if all(known) and len(set(known)) == len(known):
        return [str(colour) for colour in known]
    return [_CYCLE[k % len(_CYCLE)] for k in range(len(channels))]


def write(
    group: zarr.Group,
    header: Header,
    shapes: Sequence[tuple[int, int]],
    windows: Sequence[tuple[float, float, float, float]],
    fingerprint: str,
) -> None:
    """Write all metadata at once, as the last thing: a group without it is no image.

    Parameters
    ----------
    windows
        ``(min, max, low, high)`` of each channel, in its own units.
    """
    from ome_zarr_models.common.omero import Omero
    from ome_zarr_models.v05.image import ImageAttrs

    attributes = ImageAttrs.model_validate(
        {
            "version": "0.5",
            "multiscales": [
                store.multiscales(header.name, shapes, header.pixel_size, "cyx").model_dump(exclude_none=True)
            ],
        }
    )
    entries: list[dict[str, Any]] = []
    for name, colour, (least, most, low, high) in zip(
        header.channels, channel_colors(header.channels), windows, strict=True
    ):
        if header.is_rgb:
            low, high = 0.0, 255.0 if most <= 255 else 65535.0
        entries.append(
            {
                "label": name,
                "color": colour,
                "active": True,
                "window": {
                    "min": least,
                    "max": max(most, least + 1),
                    "start": low,
                    "end": max(high, low + 1),
                },
            }
        )
    Omero.model_validate({"channels": entries})
    ome = attributes.model_dump(by_alias=True, exclude_none=True, mode="json")
    ome["omero"] = {"channels": entries, "rdefs": {"model": "color"}}
    group.attrs.put({"ome": ome, "daskcell": {"is_rgb": header.is_rgb, "fingerprint": fingerprint}})
