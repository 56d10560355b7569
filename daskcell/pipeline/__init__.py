"""Studies from outside to inside: refuse early, then slide by slide, and what is told meanwhile.

launch            `run`, `assign`, `open_study`: settings, inputs and weights are checked before any work
collection        many slides: a window of tasks, what fails is set aside
slide             one slide: what is done is left, what is not is done
stages            the stages as values: what each needs, does and writes, and what its result depends on
groups            the clusters of all slides together
team              the workers, started when they are needed
transfer, regroup a model for other slides; other names for its groups
upgrade           a study of an older format becomes one of the present
arrays            pictures that are given from memory
progress, status  how far it is, while it runs and afterwards
"""

from daskcell.pipeline.api import as_config, assign, fingerprints, open_study, run

__all__ = ["as_config", "assign", "fingerprints", "open_study", "run"]
