"""Files beside images that are results, of daskcell or of other programs, and no images themselves.

Results of other programs are recognised by their names: that of an image beside them (or of a set of files
with one channel each) and a word of `RESULTS`, such as ``a_cp_masks.png`` beside ``a.tif``. Without such an
image, a file counts as an image.

daskcell marks the image files that it writes (`mark`, in the tag Software of TIFF and PNG). Flat fields and
overlays are never images; single channels and prepared images are, unless the image that they were made from
is among the images too. So it is with OME-Zarr that daskcell wrote.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from daskcell.errors import ImageError
from daskcell.images.filename_channels import stem, without_channel, without_ids
from daskcell.images.readers import tiffpeek
from daskcell.storage import paths

RESULTS = (
    # Cellpose, Omnipose
    "cp_masks", "masks", "seg", "flows", "cp_flows", "dp", "cellprob", "outlines", "cp_outlines", "cp_output",
    # ilastik
    "simple segmentation", "segmentation", "probabilities", "object predictions", "object identities",
    "object probabilities", "uncertainty", "features", "labels", "tracking-result",
    # StarDist, DeepCell, InstanSeg, Cell-ACDC
    "stardist", "stardist labels", "label", "instances", "prob", "dist", "instanseg", "segm", "pred",
    "prediction", "predictions",
    # CellProfiler, QuPath, ImageJ
    "objects", "overlay", "overlays", "outline", "labelled", "labeled", "mask", "binary", "segmented",
    "detections", "annotations", "label image", "labelmap", "gt", "ground truth",
    # MetaXpress
    "thumb",
)  # fmt: skip
"""Words that follow an image's name, in any letter case, after ``_``, ``-``, ``.`` or a space."""
FOLDERS = frozenset(
    ("masks", "mask", "labels", "label", "segmentation", "segmentations", "outlines", "annotations", "gt",
     "ground_truth", "groundtruth", "truth", "predictions", "cp_masks", "thumbs", "thumbnails")
)  # fmt: skip
"""Folders whose images are results if they have the names of images beside the folder."""
_IMAGES = frozenset(("images", "image", "imgs", "img", "raw"))

_WORDS = "|".join(re.sub("[ _-]", "[ _-]?", word) for word in RESULTS)
_WHAT = r"(?:(?:cells?|nuc|nuclei|nucleus|nuclear|cyto|cytoplasm|membrane)[ _-]?)?"
_RESULT = re.compile(rf"(?:(?P<image>.*?)[ _.-]+)?{_WHAT}(?:{_WORDS})", re.IGNORECASE)
_OWN = "daskcell: "
_CROPS = re.compile(r"[0-9a-f]{32}\.npy")


def results_beside(files: Sequence[str]) -> set[str]:
    """Those files of one folder that are results of other programs."""
    found = {file: match for file in files if (match := _RESULT.fullmatch(_name(file)))}
    if not found:
        return set()
    images = _images(files)
    return {file for file, match in found.items() if _same(match["image"] or "") in images}


def results_in_folders(by_folder: Mapping[str, Sequence[str]], root: str) -> set[str]:
    """Files of folders such as ``masks`` below `root` that belong to images beside the folder."""
    results: set[str] = set()
    names = {folder: paths.split(folder) for folder in by_folder}
    for folder, files in by_folder.items():
        above, name = names[folder]
        if name.lower() not in FOLDERS or folder == root:
            continue
        beside = [
            other
            for other in by_folder
            if other != folder
            and above in (other, names[other][0])
            and names[other][1].lower() not in FOLDERS
        ]
        if any(names[other][1].lower() in _IMAGES for other in beside):
            results.update(files)
            continue
        images = _images(file for other in beside for file in by_folder[other])
        for file in files:
            match = _RESULT.fullmatch(_name(file))
            if {_same(_name(file)), _same(match["image"] or "") if match else None} & images:
                results.add(file)
    return results


def mark(kind: str, image: str = "") -> str:
    """What daskcell writes as the software of an image file, in ASCII.

    Parameters
    ----------
    kind
        ``"flat field"`` or ``"overlay"``; or, of an `image`, ``"channel"`` or ``"prepared image"``.
    image
        Name of the image that it was made from.
    """
    text = f"{_OWN}{kind}" + (f" of {image}" if image else "")
    return text.encode("ascii", "backslashreplace").decode()


def marked_results(files: Iterable[str]) -> set[str]:
    """Files that daskcell marked as results, of an image among the files or of any."""
    files = list(files)
    with ThreadPoolExecutor(paths.REQUESTS_AT_ONCE) as pool:
        marks = dict(zip(files, pool.map(_mark_of, files), strict=True))
    marks = {file: text for file, text in marks.items() if text}
    made_from = {file: text.partition(" of ")[2] for file, text in marks.items()}
    images = _images(file for file in files if file not in marks) if any(made_from.values()) else set()
    images = {name.encode("ascii", "backslashreplace").decode() for name in images}
    return {file for file, image in made_from.items() if not image or _same(image) in images}


def own_zarrs(files: Iterable[str]) -> set[str]:
    """OME-Zarr images that daskcell made from an image that lies beside them, or in a folder above."""
    files = list(files)
    folders: dict[str, list[str]] = {}
    for file in files:
        if not file.endswith(".zarr"):
            folders.setdefault(paths.split(file)[0].rstrip("/"), []).append(file)
    images = {folder: _images(inside) for folder, inside in folders.items()}
    results: set[str] = set()
    for file in files if images else ():
        if file.endswith(".zarr"):
            above = [names for folder, names in images.items() if file.startswith(f"{folder}/")]
            if above and (own := _own_name(file)) is not None:
                own_names = {_same(own), _same(stem(file))}
                results.update([file] if any(own_names & names for names in above) else ())
    return results


def own_result(folder: str, folders: Sequence[str], files: Sequence[str]) -> str | None:
    """What a folder that daskcell wrote is, by its content; None for a folder that may hold images."""
    if "study.json" in files and ("ledger" in folders or _is_record(paths.join(folder, "study.json"))):
        return "a study of daskcell"
    if "cells.csv" in files and any(name.startswith("cluster-") for name in folders):
        return "an export of crops"
    visible = [name for name in files if not name.startswith(".")]
    if paths.split(folder)[1] == "crops" and visible and all(map(_CROPS.fullmatch, visible)):
        return "a folder of crops"
    return None


def _own_name(path: str) -> str | None:
    """Name of an OME-Zarr image that daskcell wrote (by `convert` or `segment`); None for any other."""
    for name in ("zarr.json", ".zattrs"):
        try:
            found = json.loads(paths.read(paths.join(path, name)))
            attributes = found.get("attributes", found)
            if "fingerprint" in attributes.get("daskcell", {}):
                return str(attributes.get("ome", attributes)["multiscales"][0].get("name", ""))
            return None
        except (OSError, ValueError, LookupError, AttributeError, TypeError, ImageError):
            continue
    return None


def _mark_of(file: str) -> str:
    """How daskcell marked a file; empty for any other file."""
    text = ""
    if file.lower().endswith((".tif", ".tiff")):
        text = tiffpeek.peek(file).software
    elif file.lower().endswith(".png"):
        with contextlib.suppress(OSError, ImageError):
            head = paths.read_head(file, 512)
            start = head.find(b"tEXtSoftware\0") + 4
            end = start + int.from_bytes(head[start - 8 : start - 4])
            text = head[start + 9 : end].decode("latin-1") if start >= 12 else ""
    return text if text.startswith(_OWN) else ""


def _is_record(path: str) -> bool:
    try:
        record = json.loads(paths.read(path))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"inputs", "slides"} <= set(record)


def _images(files: Iterable[str]) -> set[str]:
    """Names that may precede the word of a result: of files, and of images that they are channels of."""
    names: set[str] = set()
    for file in files:
        name = _name(file)
        names |= {name, paths.split(file)[1], *without_channel(name)}
    return {_same(name) for name in names}


def _name(file: str) -> str:
    return without_ids(stem(file))


def _same(name: str) -> str:
    name = name.casefold().removesuffix(".ome")
    return name.rstrip("_-. ")
