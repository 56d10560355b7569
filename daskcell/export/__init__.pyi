from .crops import export_crops as export_crops
