"""Which weights there are, where they lie, and how they come onto this machine.

Looking up never downloads: a study must not start by waiting for a gigabyte, nor W workers fetch it W times.
`fetch_weights` is the only door to the network. It checks certificates (cellpose's own downloader switches
that off) and hashes, and a file appears under its name only when it is whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from daskcell.errors import WeightsError
from daskcell.models.installed import installed_encoders, installed_file
from daskcell.storage.atomic import temporary_beside

EMBEDDED = Path(__file__).parent / "weights"
_CELLPOSE = "https://huggingface.co/mouseland/cellpose-sam/resolve/main/"
_CELLPOSE_LICENCE = "trained on CC-BY-NC data: not for commercial use"


@dataclass(frozen=True)
class Weights:
    """One entry of the list of weights."""

    name: str
    what: str
    """What the network is for, in a few words."""
    licence: str
    path: Path
    """Where the file is, or would be."""
    present: bool
    fetch: str
    """Command that fetches it; empty where nothing needs fetching."""


@dataclass(frozen=True)
class _Remote:
    what: str
    licence: str
    url: str
    sha256: str | None = None
    """Whole hash, or its first digits as torchvision writes them into file names."""
    size: str = ""


_CELLPOSE_REMOTE = {
    "cpsam_v2": _Remote(
        "segments cells (Cellpose-SAM, second version)", _CELLPOSE_LICENCE, _CELLPOSE + "cpsam_v2"
    ),
    "cpsam": _Remote("segments cells (Cellpose-SAM, first version)", _CELLPOSE_LICENCE, _CELLPOSE + "cpsam"),
}
_LISTED = ("resnet152", "resnet152@IMAGENET1K_V2", "resnet50")


def cache_folder() -> Path:
    """Where daskcell keeps what it fetched: ``DASKCELL_WEIGHTS``, or the user's cache."""
    if os.environ.get("DASKCELL_WEIGHTS"):
        return Path(os.environ["DASKCELL_WEIGHTS"]).expanduser()
    import pooch

    return Path(pooch.os_cache("daskcell")) / "weights"


def torch_folder() -> Path:
    """Where torchvision keeps its checkpoints; follows ``TORCH_HOME`` and ``XDG_CACHE_HOME`` as torch
    does."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def cellpose_folder() -> Path:
    """Where cellpose keeps its models; follows ``CELLPOSE_LOCAL_MODELS_PATH``."""
    return Path(os.environ.get("CELLPOSE_LOCAL_MODELS_PATH") or "~/.cellpose/models").expanduser()


def find_network(name: str | Path) -> Path:
    """File with the weights of a segmentation network: ``tiny``, a Cellpose name, or a path.

    Raises
    ------
    WeightsError
        If there is no such name and no such file, or the weights are not on this machine.
    """
    text = os.fspath(name)
    if text == "tiny":
        return EMBEDDED / "tiny.npz"
    if text in _CELLPOSE_REMOTE:
        places = [cache_folder() / text, cellpose_folder() / text]
        for place in places:
            if place.is_file():
                return place
        raise WeightsError(
            f"The weights of {text} are not on this machine (looked in {places[0].parent} and "
            f"{places[1].parent}). Please run 'daskcell weights fetch {text}', or choose the model "
            "'tiny', which needs no download."
        )
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise WeightsError(f"{path} is a folder. Please give the file of weights in it.")
    known = "', '".join(["tiny", *_CELLPOSE_REMOTE])
    raise WeightsError(f"There is no model '{text}': it is neither one of '{known}' nor a file of weights.")


def encoder_kind(name: str) -> Literal["own", "installed", "timm", "torchvision"]:
    """Where an encoder of this name comes from; for names that `find_encoder` takes."""
    if name == "tiny" or name.endswith(".npz"):
        return "own"
    if name.startswith("timm:"):
        return "timm"
    return "installed" if name in installed_encoders() else "torchvision"


def split_weights(name: str) -> tuple[str, Path | None]:
    """Network and file of ``resnet50@weights.safetensors``; of other names there is no file."""
    network, at, file = name.partition("@")
    if at and file.endswith(".safetensors"):
        return network, Path(file).expanduser()
    return name, None


def find_encoder(name: str | Path) -> Path:
    """File with the weights of an encoder; names as for `load_encoder`.

    A torchvision name means ``IMAGENET1K_V1`` where that is at hand, the weights that ``pretrained=True``
    stood for when the method was published, and else what is at hand of that network;
    ``resnet152@IMAGENET1K_V2`` means that and nothing else. The fingerprint tells them apart. ``timm:NAME``
    means a file of that name in `cache_folder`: timm's weights have many makers and licences. Of an encoder
    that another package has installed it is the file of its module.

    Raises
    ------
    WeightsError
        As `find_network`.
    """
    text = os.fspath(name)
    if text == "tiny":
        return EMBEDDED / "tiny_encoder.npz"
    network, own = split_weights(text)
    if own is not None:
        if not network.startswith("timm:"):
            torchvision_release(network)
        if not own.is_file():
            raise WeightsError(f"There is no file {own}. Please check the path.")
        return own
    if text.startswith("timm:"):
        return _find_timm(text)
    if text in installed_encoders():
        return installed_file(text)
    path = Path(text).expanduser()
    if path.suffix or path.is_file():
        return _encoder_file(path)
    bare, release, _ = torchvision_release(text)
    present = {
        other: place
        for other, link in _releases(bare).items()
        if (place := torch_folder() / link.rsplit("/", 1)[1]).is_file()
    }
    if release in present:
        return present[release]
    if present and "@" not in text:
        return next(iter(present.values()))
    instead = (
        f"ask for '{bare}@{next(iter(present))}', which is here"
        if present
        else "choose the encoder 'tiny', which needs none"
    )
    raise WeightsError(
        f"The weights of {bare} ({release}) are not in {torch_folder()}. Please run "
        f"'daskcell weights fetch {text}', or {instead}."
    )


def _encoder_file(path: Path) -> Path:
    if not path.is_file():
        raise WeightsError(f"There is no encoder file {path}. Please check the path.")
    if path.suffix == ".npz":
        return path
    if path.suffix == ".safetensors":
        raise WeightsError(
            f"{path} holds weights without their network. Please name the network too, as in "
            f"'resnet50@{path}' or 'timm:NAME@{path}'."
        )
    raise WeightsError(
        f"{path} is no file of weights that daskcell reads; TorchScript and torch.export files hold code. "
        "Please save the weights alone, safetensors.torch.save_file(network.state_dict(), "
        "'weights.safetensors'), and give them with the name of their network of torchvision or timm, as in "
        "'resnet50@weights.safetensors'."
    )


def _find_timm(text: str) -> Path:
    name = text.removeprefix("timm:")
    places = [cache_folder() / "timm" / f"{name}{suffix}" for suffix in (".safetensors", ".pth", ".bin")]
    for place in places:
        if place.is_file():
            return place
    raise WeightsError(
        f"The weights of {text} are not on this machine. Please read their licence at "
        f"https://huggingface.co/timm/{name}, and save model.safetensors from there as {places[0]}."
    )


def torchvision_release(name: str) -> tuple[str, str, str]:
    """Network, name of its weights and their address, of ``resnet152`` or ``resnet152@IMAGENET1K_V2``.

    Raises
    ------
    WeightsError
        If torchvision has no such classification network, or the network no such weights.
    """
    bare, _, wanted = name.partition("@")
    releases = _releases(bare)
    if wanted and wanted not in releases:
        raise WeightsError(f"{bare} has no weights '{wanted}'. Please choose one of: {', '.join(releases)}.")
    release = wanted or ("IMAGENET1K_V1" if "IMAGENET1K_V1" in releases else next(iter(releases)))
    return bare, release, releases[release]


def _releases(bare: str) -> dict[str, str]:
    if bare in _KNOWN:
        return _KNOWN[bare]
    import torchvision

    if bare not in torchvision.models.list_models(module=torchvision.models):
        raise WeightsError(
            f"There is no encoder '{bare}'. Please give one of {_choice()}, a network of torchvision such as "
            "'resnet152', one of timm such as 'timm:convnext_tiny', or a file of weights (.npz)."
        )
    return {w.name: w.url for w in torchvision.models.get_model_weights(bare)}


def _choice() -> str:
    return ", ".join(f"'{name}'" for name in ("tiny", *sorted(installed_encoders())))


# Known without torchvision, whose import takes seconds; `daskcell weights` should answer at once.
_TORCHVISION = "https://download.pytorch.org/models/"
_KNOWN = {
    "resnet152": {
        "IMAGENET1K_V1": _TORCHVISION + "resnet152-394f9c45.pth",
        "IMAGENET1K_V2": _TORCHVISION + "resnet152-f82ba261.pth",
    },
    "resnet50": {
        "IMAGENET1K_V1": _TORCHVISION + "resnet50-0676ba61.pth",
        "IMAGENET1K_V2": _TORCHVISION + "resnet50-11ad3fa6.pth",
    },
}


def list_weights() -> list[Weights]:
    """The weights daskcell knows by name, embedded ones first; nothing is downloaded or imported for it."""
    entries = [
        Weights(
            "tiny", "segments cells and nuclei", "BSD-3-Clause, as daskcell", EMBEDDED / "tiny.npz", True, ""
        ),
        Weights(
            "tiny",
            "encoder: cell crops to features",
            "BSD-3-Clause, as daskcell",
            EMBEDDED / "tiny_encoder.npz",
            True,
            "",
        ),
    ]
    for name, remote in _CELLPOSE_REMOTE.items():
        places = [cache_folder() / name, cellpose_folder() / name]
        found = next((p for p in places if p.is_file()), None)
        entries.append(_entry(name, remote.what, remote.licence, found or places[0], found is not None))
    for name, point in sorted(installed_encoders().items()):
        package = point.dist.name if point.dist is not None else point.module
        entries.append(_entry(name, "encoder", f"that of {package}", installed_file(name), True))
    for name in _LISTED:
        bare, release, url = torchvision_release(name)
        place = torch_folder() / url.rsplit("/", 1)[1]
        what = f"encoder: {bare} of torchvision ({release})"
        entries.append(_entry(name, what, "BSD-3-Clause; trained on ImageNet", place, place.is_file()))
    return entries


def _entry(name: str, what: str, licence: str, path: Path, present: bool) -> Weights:
    return Weights(name, what, licence, path, present, "" if present else f"daskcell weights fetch {name}")


def fetch_weights(name: str, *, report: Callable[[str], None] = print) -> Path:
    """Bring weights onto this machine; does nothing if they are there.

    Parameters
    ----------
    name
        ``cpsam_v2``, ``cpsam``, or a torchvision name such as ``resnet152`` or ``resnet152@IMAGENET1K_V2``.
    report
        Called with a line about what is being done.

    Returns
    -------
    Path
        The file. torchvision's lie where torchvision looks for them, others in `cache_folder`.

    Raises
    ------
    WeightsError
        If the name is unknown, the download fails, or the file is not what its hash says.
    """
    if name in ("tiny", ""):
        return EMBEDDED / "tiny.npz"
    if name in _CELLPOSE_REMOTE:
        try:
            return find_network(name)
        except WeightsError:
            remote, target = _CELLPOSE_REMOTE[name], cache_folder() / name
            report(f"{name}: {remote.licence}.")
            return _download(remote.url, target, remote.sha256 or _published_hash(remote.url), report)
    try:
        _, _, url = torchvision_release(name)
    except WeightsError as error:
        if "@" in name:
            raise
        raise WeightsError(
            f"There are no weights called '{name}'. Please choose one that 'daskcell weights' lists, or "
            "a classification network of torchvision."
        ) from error
    target = torch_folder() / url.rsplit("/", 1)[1]
    if target.is_file():
        return target
    digits = re.search(r"-([0-9a-f]{8,})\.", target.name)
    return _download(url, target, digits.group(1) if digits else None, report)


def _published_hash(url: str) -> str | None:
    """sha256 that the server states for a large file, so that a damaged download is noticed."""
    import requests

    try:
        answer = requests.head(url, allow_redirects=False, timeout=30)
    except requests.RequestException as error:
        raise WeightsError(_unreachable(url, error)) from error
    tag = answer.headers.get("X-Linked-ETag", "").strip('"')
    return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None


def _download(url: str, target: Path, sha256: str | None, report: Callable[[str], None]) -> Path:
    import pooch
    import requests

    report(f"fetching {url} to {target}")
    part = temporary_beside(target).name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        got = Path(
            pooch.retrieve(
                url, known_hash=None, fname=part, path=target.parent,
                downloader=pooch.HTTPDownloader(progressbar=False, timeout=60),
            )
        )  # fmt: skip
        found = pooch.file_hash(str(got), alg="sha256")
        if sha256 and not found.startswith(sha256):
            raise WeightsError(
                f"{url} gave a file with sha256 {found[:16]}… instead of {sha256[:16]}…; it was removed. "
                "Please try again."
            )
        os.replace(got, target)
    except (requests.RequestException, OSError) as error:
        raise WeightsError(_unreachable(url, error)) from error
    finally:
        (target.parent / part).unlink(missing_ok=True)
    return target


def _unreachable(url: str, error: Exception) -> str:
    reason = type(error).__name__
    return (
        f"Cannot fetch {url} ({reason}). Please check the connection, or copy the file from another machine."
    )
