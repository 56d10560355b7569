from .lazy import embed as embed
from .lazy import measure as measure
