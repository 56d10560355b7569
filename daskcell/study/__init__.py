"""A study on disk: its folder, and what makes it safe to be killed and continued.

folder     paths and the record
ledger     which stages are done
keys       what a stage's result depends on
checksums  whether files are still what the stages wrote
lock       one run at a time
"""

from daskcell.study.folder import CLUSTERS, Study, check_folder, read_record, sweep, versions
from daskcell.study.ledger import Ledger

__all__ = ["CLUSTERS", "Ledger", "Study", "check_folder", "read_record", "sweep", "versions"]
