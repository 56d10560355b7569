from .crops import export_crops as export_crops
from .registry import Exporter as Exporter
from .registry import export_study as export_study
