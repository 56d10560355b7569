from .lazy import segment as segment
from .seams import SeamReport as SeamReport
