"""A study on disk: its folder, and what makes it safe to be killed and continued.

paths          where the files are
record         study.json, failures, progress
foreign_files  which files may be replaced
ledger         which stages are done
keys           what a stage's result depends on
checksums      whether files are still what the stages wrote
results        what each stage found
study          what users read
"""

from daskcell.study.ledger import Ledger
from daskcell.study.paths import CLUSTERS, StudyPaths
from daskcell.study.record import Record, check_folder, read_record, sweep, versions
from daskcell.study.study import Study, create_study

__all__ = [
    "CLUSTERS",
    "Ledger",
    "Record",
    "Study",
    "StudyPaths",
    "check_folder",
    "create_study",
    "read_record",
    "sweep",
    "versions",
]
