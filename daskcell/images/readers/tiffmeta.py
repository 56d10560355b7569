"""Metadata of TIFF files: pixel size in micrometres, names of channels and scenes, axes."""

from __future__ import annotations

import json
import math
import re
from typing import Any
from xml.etree import ElementTree

from daskcell.errors import ImageError
from daskcell.images.filename_channels import name_channels
from daskcell.images.readers.tiffcheck import Forms

LARGEST_PIXEL_UM = 20.0
"""Resolution tags that say more are those of a screen or printer (72 dpi is 353 um), not of a microscope."""

_UM = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "\\u00b5m": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "nm": 1e-3,
    "å": 1e-4,
    "pm": 1e-6,
    "inch": 25400.0,
    "in": 25400.0,
}

_OME_BYTES = {
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "float": 4,
    "double": 8,
}
"""Bytes per pixel of each type; the pages say whether it is signed."""
MOST_PLANES = 2**20
"""Channels, planes and time points together."""


def check_description(file: Any, path: str) -> None:
    """Refuse OME-XML that cannot be read: which pages are which channel is not known then."""
    text = file.pages[0].description
    if "<OME" in text[:2000] or "openmicroscopy.org" in text[:2000]:
        try:
            ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise ImageError(f"Cannot read {path}: its OME metadata is broken ({error}).") from None
    for pixels in _all_pixels(file):
        sizes = [pixels.get(f"Size{axis}", "") for axis in "XYCZT"]
        if not all(size.isdigit() and int(size) for size in sizes):
            raise ImageError(f"Cannot read {path}: its OME metadata give no sizes ({', '.join(sizes)}).")
        planes = math.prod(map(int, sizes[2:]))
        if planes > MOST_PLANES:  # tifffile would list them
            raise ImageError(f"Cannot read {path}: its OME metadata claim {planes} planes.")


def check_counts(file: Any, series: Any, image: int, path: str, forms: Forms) -> None:
    """Refuse a file whose metadata describe other pages than it has; `forms` are those of its pages.

    `image` is the position of the series among the images of the metadata.
    """
    pixels = _ome_pixels(file, image)
    if pixels is not None:
        _check_ome(file, series, pixels, path, forms)
    elif series is not file.series[0]:
        return
    elif file.is_imagej:
        said = file.imagej_metadata or {}
        planes = [said.get(name, 1) for name in ("images", "channels", "slices", "frames")]
        if series.kind != "imagej" and planes != [1, 1, 1, 1]:
            raise ImageError(f"Cannot read {path}: it is said to be a stack, and its pages are not that.")
    elif file.is_shaped:
        found = re.search(r'\{"shape": \[([0-9, ]+)\]', file.pages[0].shaped_description or "")
        shape = [int(side) for side in found[1].split(",")] if found else series.shape
        if math.prod(shape) != math.prod(series.shape):
            raise ImageError(
                f"Cannot read {path}: it is said to be of shape {tuple(shape)}, and is {series.shape}."
            )


def _check_ome(file: Any, series: Any, pixels: Any, path: str, forms: Forms) -> None:
    """OME-XML must agree with the pages of its first image, and name all that are like them."""
    key, kind = series.keyframe, pixels.get("Type", "").lower()
    said = int(pixels.get("SizeY")), int(pixels.get("SizeX"))
    if said != (key.imagelength, key.imagewidth) or (
        kind in _OME_BYTES and _OME_BYTES[kind] != key.dtype.itemsize
    ):
        raise ImageError(
            f"Cannot read {path}: its OME metadata say {said[0]} x {said[1]} pixels of {kind}, its pages "
            f"{key.imagelength} x {key.imagewidth} of {key.dtype}."
        )
    if series.kind != "ome":
        raise ImageError(f"Cannot read {path}: its OME metadata do not tell which page is what.")
    used = {(page.parent, page.offset) for one in file.series for page in one.pages if page is not None}
    spare = sum(place not in used and form == forms.get((file, key.offset)) for place, form in forms.items())
    if spare:
        raise ImageError(f"Cannot read {path}: its OME metadata do not name {spare} of its pages.")


def stated_axes(file: Any, series: Any) -> str | None:
    """The axes of a series by its metadata; None for pages without."""
    if series.kind == "shaped":
        try:
            said = json.loads(series.keyframe.shaped_description or "{}").get("axes")
        except (ValueError, AttributeError):
            said = None
        return str(series.axes) if said else None
    return None if series.kind in ("generic", "uniform") else str(series.axes)


def pixel_size(file: Any, page: Any, image: int = 0) -> tuple[float, float] | None:
    """``(y, x)`` of an image in micrometres, from OME-XML, ImageJ, Aperio or resolution tags.

    None if none of them is sound.
    """
    return (
        _sound(_ome_size(file, image))
        or _sound(_imagej_size(file, page))
        or _sound(_aperio_size(page))
        or _sound(_tag_size(page))
    )


def channel_names(file: Any, count: int, image: int = 0) -> tuple[str, ...] | None:
    """Names of `count` channels where OME-XML, ImageJ or tifffile's own description give any."""
    names: list[str] = []
    pixels = _ome_pixels(file, image)
    if pixels is not None:
        for channel in (each for each in pixels if each.tag.endswith("}Channel")):
            samples = channel.get("SamplesPerPixel", "1")
            name = channel.get("Name") or channel.get("Fluor") or ""
            names += [name] * (int(samples) if samples.isdigit() else 1)
    elif file.is_imagej:
        labels = (file.imagej_metadata or {}).get("Labels") or []
        names = [str(label) for label in labels] if len(labels) == count else []
    elif file.is_shaped:
        metadata: Any = file.shaped_metadata or [{}]
        said = metadata[0].get("Channel")
        given = said.get("Name") if isinstance(said, dict) else None
        names = [str(name) for name in ([given] if isinstance(given, str) else given or [])]
    return name_channels(names, count) if any(name.strip() for name in names) else None


def _sound(size: tuple[float, float] | None) -> tuple[float, float] | None:
    if size is None or not all(math.isfinite(s) and 1e-5 < s < 1e4 for s in size):
        return None
    return float(f"{size[0]:.6g}"), float(f"{size[1]:.6g}")


def ome_images(file: Any) -> list[str]:
    """Names of the images in OME-XML, empty for those without; none without OME-XML."""
    return [image.get("Name", "") for image, _ in _ome_images(file)]


def _ome_images(file: Any) -> list[tuple[Any, Any]]:
    """Each ``Image`` of OME-XML with its ``Pixels``, in the order of tifffile's series."""
    text = file.ome_metadata
    if not text:
        return []
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return []
    images = [element for element in root.iter() if element.tag.endswith("}Image")]
    return [(image, pixels) for image in images for pixels in image if pixels.tag.endswith("}Pixels")]


def first_pages(file: Any) -> list[tuple[str, int] | None]:
    """Name of the file, and number of the page in it, where each image of OME-XML begins."""
    found: list[tuple[str, int] | None] = []
    for pixels in _all_pixels(file):
        data = next((element for element in pixels if element.tag.endswith("}TiffData")), None)
        if data is None:
            found.append(None)
            continue
        names = [element.get("FileName", "") for element in data if element.tag.endswith("}UUID")]
        number = data.get("IFD", "0")
        found.append((next(iter(names), file.filename), int(number) if number.isdigit() else 0))
    return found


def _all_pixels(file: Any) -> list[Any]:
    return [pixels for _, pixels in _ome_images(file)]


def _ome_pixels(file: Any, image: int) -> Any:
    found = _all_pixels(file)
    return found[image] if image < len(found) else None


def _ome_size(file: Any, image: int) -> tuple[float, float] | None:
    pixels = _ome_pixels(file, image)
    if pixels is None:
        return None
    sizes = []
    for axis in "YX":
        factor = _UM.get(pixels.get(f"PhysicalSize{axis}Unit", "um").lower())
        try:
            sizes.append(float(pixels.get(f"PhysicalSize{axis}")) * (factor or math.nan))
        except (TypeError, ValueError):
            return None
    return sizes[0], sizes[1]


def _imagej_size(file: Any, page: Any) -> tuple[float, float] | None:
    if not file.is_imagej:
        return None
    factor = _UM.get(str((file.imagej_metadata or {}).get("unit", "")).lower())
    resolution = _resolution(page)
    if factor is None or resolution is None:
        return None
    return factor / resolution[0], factor / resolution[1]


def _aperio_size(page: Any) -> tuple[float, float] | None:
    found = re.search(r"\bMPP\s*=\s*([0-9.]+)", page.description or "")
    return (float(found[1]),) * 2 if found and found[1].count(".") <= 1 else None


def _tag_size(page: Any) -> tuple[float, float] | None:
    factor = {2: 25400.0, 3: 1e4}.get(int(page.tags.valueof(296, 1) or 1))
    resolution = _resolution(page)
    if factor is None or resolution is None:
        return None
    size = factor / resolution[0], factor / resolution[1]
    return size if max(size) <= LARGEST_PIXEL_UM else None


def _resolution(page: Any) -> tuple[float, float] | None:
    """Pixels per unit ``(y, x)``."""
    values = []
    for tag in (283, 282):
        value = page.tags.valueof(tag)
        if not isinstance(value, tuple) or len(value) != 2 or not value[0] or not value[1]:
            return None
        values.append(value[0] / value[1])
    return values[0], values[1]
