"""Files beside images that are results, of daskcell or of other programs, and no images themselves.

Told by names alone: a file is a result if its name is that of an image beside it (or of a set of files with
one channel each) and a word of `RESULTS`, such as ``a_cp_masks.png`` beside ``a.tif``. Without such an image
it counts as an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from daskcell.images.filename_channels import stem, without_channel, without_ids
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
"""What is added to an image's name, in any letter case and after ``_``, ``-``, ``.`` or a space."""
FOLDERS = frozenset(
    ("masks", "mask", "labels", "label", "segmentation", "segmentations", "outlines", "annotations", "gt",
     "ground_truth", "groundtruth", "predictions", "cp_masks", "thumbs", "thumbnails")
)  # fmt: skip
"""Folders whose pictures are results if they have the names of images beside the folder."""
_IMAGES = frozenset(("images", "image", "imgs", "img", "raw"))

_WORDS = "|".join(re.sub("[ _-]", "[ _-]?", word) for word in RESULTS)
_WHAT = r"(?:(?:cells?|nuc|nuclei|nucleus|nuclear|cyto|cytoplasm|membrane)[ _-]?)?"
_RESULT = re.compile(rf"(?:(?P<image>.*?)[ _.-]+)?{_WHAT}(?:{_WORDS})", re.IGNORECASE)
_CROPS = re.compile(r"[0-9a-f]{32}\.npy")


def results_beside(files: Sequence[str]) -> set[str]:
    """Those of the files of one folder that are results of others."""
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


def own_result(folder: str, folders: Sequence[str], files: Sequence[str]) -> str | None:
    """What of daskcell a folder is, given what lies in it: None for a folder that may hold images."""
    if "study.json" in files and ("ledger" in folders or _is_record(paths.join(folder, "study.json"))):
        return "a study of daskcell"
    if "cells.csv" in files and any(name.startswith("cluster-") for name in folders):
        return "an export of crops"
    pictures = [name for name in files if not name.startswith(".")]
    if paths.split(folder)[1] == "crops" and pictures and all(map(_CROPS.fullmatch, pictures)):
        return "a folder of crops"
    return None


def is_own_zarr(path: str) -> bool:
    """Whether daskcell wrote an OME-Zarr image, such as the result of `convert` or `segment`."""
    for name in ("zarr.json", ".zattrs"):
        try:
            found = json.loads(paths.read(paths.join(path, name)))
            return "fingerprint" in found.get("attributes", found).get("daskcell", {})
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return False


def _is_record(path: str) -> bool:
    try:
        record = json.loads(paths.read(path))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"inputs", "slides"} <= set(record)


def _images(files: Iterable[str]) -> set[str]:
    """Names that a result may have before its word: of the files, and of the images they are channels of."""
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
