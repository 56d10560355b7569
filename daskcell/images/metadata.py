"""The metadata of OME-Zarr images and labels, 0.4 and 0.5, built and checked with ome-zarr-models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
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
    method: str | None,
) -> None:
    """Write all metadata at once, as the last thing: a group without it is no image.

    Parameters
    ----------
    windows
        ``(min, max, low, high)`` of each channel, in its own units.
    method
        How the levels were made.
    """
    from ome_zarr_models.common.omero import Omero

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
    version = store.version_of(group)
    ome = multiscales(header.name, shapes, header.pixel_size, "cyx", method)
    ome = checked("image.ImageAttrs", ome, version)
    ome["omero"] = {"channels": entries, "rdefs": {"model": "color"}}
    own: Any = {"is_rgb": header.is_rgb, "fingerprint": fingerprint}
    group.attrs.put({**enveloped(ome, version), "daskcell": own})


def multiscales(
    name: str,
    shapes: Sequence[tuple[int, int]],
    pixel_size: tuple[float, float] | None,
    axes: str,
    method: str | None,
) -> dict[str, Any]:
    """The ``multiscales`` of an image or label image; the scale is 1, without unit, where none is known."""
    y, x = pixel_size or (1.0, 1.0)
    kinds: list[dict[str, str]] = []
    for axis in axes:
        kinds.append({"name": axis, "type": "channel" if axis == "c" else "space"})
        if pixel_size and axis != "c":
            kinds[-1]["unit"] = "micrometer"
    datasets = []
    for level in range(len(shapes)):
        step, others = 2**level, [1.0] * (len(axes) - 2)
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": [*others, y * step, x * step]}]
        if level:  # the centre of a pixel that covers 2 x 2 lies half a pixel further in
            shift = [*(0.0 for _ in others), y * (step - 1) / 2, x * (step - 1) / 2]
            steps.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    entry = {"name": name, "axes": kinds, "datasets": datasets}
    return {"multiscales": [entry | ({"type": method} if method else {})]}


def checked(model: str, entries: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The entries with what `version` adds to them, after a model of ome-zarr-models took them.

    Its ``image.ImageAttrs`` and the like are named as there; raises pydantic's `ValidationError`.
    """
    module, name = model.split(".")
    package = f"ome_zarr_models.v{version.replace('.', '')}"
    if version == "0.4":
        entries = {**entries, "multiscales": [{**entries["multiscales"][0], "version": version}]}
    else:
        entries = {**entries, "version": version}
    made = getattr(import_module(f"{package}.{module}"), name).model_validate(entries)
    return made.model_dump(by_alias=True, exclude_none=True, mode="json")


def enveloped(ome: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Attributes of a group: 0.5 keeps what is OME's under a name of its own, 0.4 beside all else."""
    return dict(ome) if version == "0.4" else {"ome": {"version": version, **ome}}
