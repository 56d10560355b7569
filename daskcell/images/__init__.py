"""Reading any microscope file, telling channels apart, and OME-Zarr on disk, where all stages meet."""

from daskcell.images.convert import convert_slide
from daskcell.images.image import Image, convert, open_image
from daskcell.images.labels import build_label_pyramid, create_labels, read_labels, write_labels_block
from daskcell.images.sources import Source, describe_sources, find_images
from daskcell.images.store import ImageInfo, image_info, read_block

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
    "read_labels",
    "write_labels_block",
]
