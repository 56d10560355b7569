from .base import Look as Look
from .base import Method as Method
from .base import Read as Read
from .base import tiles_of as tiles_of
from .cellpose import CellposeMethod as CellposeMethod
from .cellpose import network_source as network_source
from .function import BlockMethod as BlockMethod
from .function import touches_rim as touches_rim
