from .expansion import expand as expand
from .lazy import segment as segment
from .pairing import pair as pair
from .seams import SeamReport as SeamReport
