from .overlays import write_cluster_labels as write_cluster_labels
from .overlays import write_overlay as write_overlay
from .paint import CLUSTER_COLORS as CLUSTER_COLORS
from .paint import add_legend as add_legend
from .paint import colors as colors
from .paint import overlay as overlay
from .paint import paint as paint
