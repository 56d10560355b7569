"""Encoders by name: daskcell's own, torchvision's, timm's, and those of other packages."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from daskcell.errors import InputError, WeightsError
from daskcell.models import weights_file
from daskcell.models.installed import installed_fingerprint, make_installed
from daskcell.models.loading import cached, check_device, file_fingerprint, fill
from daskcell.models.registry import encoder_kind, find_encoder, split_weights, torchvision_release

if TYPE_CHECKING:
    import torch


def load_encoder(
    name_or_path: str | Path = "tiny",
    device: str = "cpu",
    *,
    layer: Literal["output", "pool"] = "output",
) -> torch.nn.Module:
    """An encoder: a network from crops of cells to feature vectors.

    Parameters
    ----------
    name_or_path : str or path
        ``tiny`` (embedded); a file of weights made by `train_encoder` (``.npz``); a classification network of
        torchvision (``resnet152``, ``resnet152@IMAGENET1K_V2``) or timm (``timm:NAME``); one of these with
        weights of your own (``resnet50@weights.safetensors``); or the name of an encoder that another package
        has installed (entry point group ``daskcell.encoders``).
    device : str
        ``cpu``, ``cuda`` or ``cuda:<n>``.
    layer : {"output", "pool"}
        The network's outputs, or the vector before its last layer; the latter for torchvision and timm.

    Returns
    -------
    torch.nn.Module
        In evaluation mode; ``forward`` takes crops ``(N, 3, H, W)`` float and returns ``(N, d)``. ``tiny``
        wants values from 0 to 1, with neighbours blanked out by the background's colour; the others want
        ImageNet's mean and deviation taken off: attributes ``size`` (pixels), ``mean`` and ``std`` (None for
        ``tiny``) say so. Shared within the process: do not train it. Another package's encoder may be any
        callable.

    Raises
    ------
    WeightsError
        There is no encoder of this name, or its weights are missing, damaged, or another network's.
    InputError
        The network has no vector before its last layer.
    ComputeError
        The device is not there.

    Examples
    --------
    >>> import torch
    >>> encoder = load_encoder("tiny")
    >>> encoder.size
    64
    >>> encoder(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 96])
    """
    name = os.fspath(name_or_path)
    fingerprint = encoder_fingerprint(name)
    check_layer(name, layer)
    check_device(device)
    kind = encoder_kind(name)
    network = "" if kind == "own" else name
    key = ("encoder", fingerprint, str(device), network, layer)
    return cached(key, lambda: _build(name, device, layer))


def encoder_fingerprint(name_or_path: str | Path = "tiny") -> str:
    """sha256 of an encoder's weights; of name and version of another package's."""
    name = os.fspath(name_or_path)
    path = find_encoder(name)
    return installed_fingerprint(name) if encoder_kind(name) == "installed" else file_fingerprint(path)


def check_layer(name: str, layer: str) -> None:
    """Raise `InputError` unless an encoder has this layer."""
    if layer == "pool" and encoder_kind(name) not in {"torchvision", "timm"}:
        raise InputError(
            f"layer='pool' is for torchvision's and timm's networks; the encoder {name} has one output only."
        )


def _build(name: str, device: str, layer: str) -> Any:
    kind = encoder_kind(name)
    if kind == "installed":
        network = make_installed(name)
        if hasattr(network, "eval"):
            network.to(device).eval().requires_grad_(False)
        return network
    build: dict[str, Callable[[str, str], Any]] = {
        "own": _build_own, "torchvision": _build_torchvision, "timm": _build_timm
    }  # fmt: skip
    return build[kind](name, layer).to(device).eval().requires_grad_(False)


def _build_own(name: str, _: str) -> torch.nn.Module:
    from daskcell.models.encoder import KIND, TinyEncoder

    path = find_encoder(name)
    weights, _, _ = weights_file.load_weights(path, KIND)
    try:
        widths = tuple(len(weights[f"blocks.{i}.first.weight"]) for i in range(4))
        net = TinyEncoder(widths, len(weights["turn"]))
    except KeyError as error:
        raise WeightsError(f"{path} does not hold a whole encoder: {error} is missing.") from error
    fill(net, weights, path)
    return net


def _build_torchvision(name: str, layer: str) -> torch.nn.Module:
    import torch
    import torchvision

    bare, release, _ = torchvision_release(split_weights(name)[0])
    recipe = torchvision.models.get_model_weights(bare)[release].transforms()
    builder = torchvision.models.get_model_builder(bare)
    options: dict[str, Any] = {}
    if "init_weights" in inspect.signature(builder).parameters or bare in {"googlenet", "inception_v3"}:
        options = {"init_weights": False, "aux_logits": True}  # random numbers nobody needs take a minute
    net = builder(weights=None, **options)
    last = [part for part, module in net.named_modules() if isinstance(module, torch.nn.Linear)][-1:]
    if not last or last[0].split(".")[0] not in {"fc", "classifier", "heads", "head"}:
        last = []
    state = _read_state(name)
    rows = len(state.get(f"{last[0]}.weight", ())) if last else 0
    if split_weights(name)[1] is not None and rows not in (0, 1000):
        net = builder(weights=None, num_classes=rows, **options)
    _fill_state(net, state, name)
    if layer == "pool":
        if not last:
            raise InputError(f"layer='pool' cannot be had from {name}: it has no last linear layer.")
        net.set_submodule(last[0], torch.nn.Identity())
    net.size, net.mean, net.std = int(recipe.crop_size[0]), tuple(recipe.mean), tuple(recipe.std)
    return net


def _build_timm(name: str, layer: str) -> torch.nn.Module:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError:
        raise WeightsError(
            f"{name} needs timm, which is not installed. Please run: pip install 'daskcell[timm]'"
        ) from None
    bare, own = split_weights(name)
    state = _read_state(name)
    options: dict[str, Any] = {}
    try:
        net: Any = timm.create_model(bare.removeprefix("timm:"), pretrained=False)
        head = net.pretrained_cfg.get("classifier")
        if own is not None and isinstance(head, str) and f"{head}.weight" in state:
            options = {"num_classes": len(state[f"{head}.weight"])}
            net = timm.create_model(bare.removeprefix("timm:"), pretrained=False, **options)
    except Exception as error:
        raise WeightsError(f"timm has no network '{bare.removeprefix('timm:')}' ({error}).") from error
    _fill_state(net, state, name)
    if layer == "pool":
        net.reset_classifier(0)
    recipe = resolve_model_data_config(net)
    net.size, net.mean, net.std = int(recipe["input_size"][1]), tuple(recipe["mean"]), tuple(recipe["std"])
    return net


def _read_state(name: str) -> dict[str, Any]:
    import torch

    path = find_encoder(name)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _other_weights(name, error) from error


def _fill_state(net: torch.nn.Module, state: dict[str, Any], name: str) -> None:
    try:
        net.load_state_dict(state, strict=True)
    except Exception as error:
        raise _other_weights(name, error) from error


def _other_weights(name: str, error: Exception) -> WeightsError:
    bare, own = split_weights(name)
    remedy = "Please check the name and the file."
    if own is None and encoder_kind(name) == "torchvision":
        remedy = f"Remove it and run 'daskcell weights fetch {name}'."
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return WeightsError(f"{find_encoder(name)} does not hold the weights of {bare} ({reason}). {remedy}")
