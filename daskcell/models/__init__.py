"""Embedded networks, and the registry of weights.

Names are imported on first use: none of them costs the import of torch before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskcell.models.loading import (
        clear_networks,
        encoder_fingerprint,
        load_encoder,
        load_network,
        network_fingerprint,
    )
    from daskcell.models.registry import Weights, fetch_weights, find_encoder, find_network, list_weights

_HOME = {
    "clear_networks": "loading",
    "encoder_fingerprint": "loading",
    "load_encoder": "loading",
    "load_network": "loading",
    "network_fingerprint": "loading",
    "Weights": "registry",
    "fetch_weights": "registry",
    "find_encoder": "registry",
    "find_network": "registry",
    "list_weights": "registry",
}

__all__ = [
    "Weights",
    "clear_networks",
    "encoder_fingerprint",
    "fetch_weights",
    "find_encoder",
    "find_network",
    "list_weights",
    "load_encoder",
    "load_network",
    "network_fingerprint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
