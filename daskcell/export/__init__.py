"""A study's results in the forms that other programs read."""

from daskcell.export.crops import export_crops

__all__ = ["export_crops"]
