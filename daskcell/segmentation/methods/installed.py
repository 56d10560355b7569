"""Methods by name: daskcell's own, and those of other packages (entry point ``daskcell.methods``)."""

from __future__ import annotations

import copy
import inspect
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from daskcell.config import METHODS, SegmentSettings, WatershedSettings, installed_methods
from daskcell.errors import InputError
from daskcell.segmentation.core.ownership import Thresholds
from daskcell.segmentation.methods.base import Method
from daskcell.segmentation.methods.cellpose import CellposeMethod, network_source
from daskcell.segmentation.methods.function import FunctionMethod
from daskcell.segmentation.methods.watershed import WatershedMethod


def make_method(
    method: Any,
    settings: SegmentSettings,
    *,
    model: Any = None,
    device: str = "cpu",
    options: dict[str, Any] | None = None,
) -> Method:
    """The method that settings name.

    Parameters
    ----------
    method : str, `Method` or callable
        Name of an installed method; or a method; or a function ``(C, h, w) -> (h, w)`` labels.
    settings : SegmentSettings
        Thresholds, and what the named method looks at.
    model : str or torch.nn.Module, optional
        Network for Cellpose, in place of ``settings.model``.
    device : str
        ``"cpu"`` or ``"cuda"``: where a network runs.
    options : dict, optional
        In place of ``settings.watershed`` or ``settings.options``.

    Raises
    ------
    InputError
        No method of this name is installed; an option it does not have, or cannot use.
    """
    limits = Thresholds(
        settings.cellprob_threshold, settings.flow_threshold, settings.min_size, settings.max_size_fraction
    )
    if method == "cellpose":
        _refuse_options(method, options, ())
        diameter: Any = settings.diameter
        return CellposeMethod(
            network_source(settings.model if model is None else model, device, settings.precision),
            limits,
            float(diameter) if isinstance(diameter, (int, float)) else diameter,
            settings.batch_size,
            settings.niter,
            settings.normalize,
        )
    found: Method
    if method == "watershed":
        found = WatershedMethod(settings.watershed if options is None else _watershed(options))
    else:
        found = _other(method, settings.options if options is None else options)
    found.thresholds = Thresholds(limits.cellprob, 0.0, limits.min_size, limits.max_size_fraction)
    return found


def _watershed(options: dict[str, Any]) -> WatershedSettings:
    _refuse_options("watershed", options, tuple(WatershedSettings.model_fields))
    try:
        return WatershedSettings(**options)
    except ValueError as error:
        raise InputError(f"Watershed options {options} cannot be used: {error}.") from None


def _other(method: Any, options: dict[str, Any]) -> Method:
    """A method of another package, or what was given in place of a name."""
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    target = load_method(method) if isinstance(method, str) else method
    if isinstance(target, type) and issubclass(target, Method):
        parameters = inspect.signature(target).parameters
        if not any(value.kind is value.VAR_KEYWORD for value in parameters.values()):
            _refuse_options(name, options, tuple(parameters))
        try:
            return target(**options)
        except (TypeError, ValueError) as error:
            raise InputError(f"The method '{name}' cannot use the options {options}: {error}.") from error
    if isinstance(target, Method):
        _refuse_options(name, options, ())
        return copy.copy(target)
    if not callable(target):
        raise InputError(f"Cannot find cells by {method!r}. Please give {_choice()}, or a function.")
    return FunctionMethod(partial(target, **options) if options else target)


def _refuse_options(name: str, options: dict[str, Any] | None, known: tuple[str, ...]) -> None:
    for option in sorted(set(options or ()) - set(known)):
        raise InputError(f"'{name}' has no option {option!r}; it has {', '.join(known) or 'no options'}.")


def _choice() -> str:
    return "one of " + ", ".join(installed_methods())


@cache
def _entry_point(name: str) -> EntryPoint:
    found = entry_points(group="daskcell.methods", name=name)
    for point in found:
        return point
    raise InputError(f"No segmentation method '{name}' is installed. Please give {_choice()}.")


def load_method(name: str) -> Any:
    """What the package has registered: a subclass of `Method`, a `Method`, or a function."""
    point = _entry_point(name)
    try:
        return point.load()
    except Exception as error:
        raise InputError(
            f"The segmentation method '{name}' ({point.value}) cannot be loaded: {error}."
        ) from error


def method_version(name: str) -> str:
    """Version of the labels that a method gives: its own, or that of its package; empty for daskcell's.

    Raises
    ------
    InputError
        No method of this name is installed.
    """
    if name in METHODS:
        return ""
    own = getattr(load_method(name), "version", "")
    distribution = _entry_point(name).dist
    return str(own or (distribution.version if distribution is not None else ""))
