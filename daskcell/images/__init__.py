"""Reading any microscope file, telling channels apart, and OME-Zarr on disk, where all stages meet."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskcell.images.conversion import convert_slide
    from daskcell.images.discovery import describe_sources, find_images
    from daskcell.images.export_channels import split_channels
    from daskcell.images.image import Image, convert, open_image
    from daskcell.images.labels import build_label_pyramid, create_labels, read_labels, write_labels_block
    from daskcell.images.sources import Source
    from daskcell.images.store import ImageInfo, image_info, read_block, read_histograms

# Imported when asked for: the process that opens files needs neither zarr nor dask.
_WHERE = {
    "Image": "image",
    "ImageInfo": "store",
    "Source": "sources",
    "build_label_pyramid": "labels",
    "convert": "image",
    "convert_slide": "conversion",
    "create_labels": "labels",
    "describe_sources": "search",
    "find_images": "search",
    "image_info": "store",
    "open_image": "image",
    "read_block": "store",
    "read_histograms": "store",
    "read_labels": "labels",
    "split_channels": "split",
    "write_labels_block": "labels",
}

__all__ = [
    "Image",
    "ImageInfo",
    "Source",
    "build_label_pyramid",
    "convert",
    "convert_slide",
    "create_labels",
    "describe_sources",
    "find_images",
    "image_info",
    "open_image",
    "read_block",
    "read_histograms",
    "read_labels",
    "split_channels",
    "write_labels_block",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    return value
