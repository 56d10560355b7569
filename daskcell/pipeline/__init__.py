"""Runs, from the outside to the inside: refuse early, then work slide by slide, and report progress.

api               `run`, `assign`, `open_study`: settings, inputs and weights are checked before any work
runner            many slides: over workers or in this process; slides that fail are set aside
slide             one slide: its stages that are not done yet
stage, stages     what a stage is, and the stages: what each needs, does and writes
cluster_stage     the clusters of all slides together
worker_pool       the workers, started when they are needed
reuse_model, edit_clusters   a fitted model for other slides; other names for its clusters
upgrade           brings a study of an older format up to date
arrays            images given as arrays
steps, progress, status      how far a run is, while it lasts and afterwards
plan, doctor      what a run would do; what would stop it
"""

from daskcell.pipeline.api import as_config, assign, fingerprints, open_study, run

__all__ = ["as_config", "assign", "fingerprints", "open_study", "run"]
