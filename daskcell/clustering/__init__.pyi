from .engine import fit_features as fit_features
from .engine import predict_slide as predict_slide
from .fit import fit_clusters as fit_clusters
from .model import ClusterModel as ClusterModel
from .model import load_clusters as load_clusters
from .neighbourhoods import Neighbours as Neighbours
from .neighbourhoods import neighbours as neighbours
