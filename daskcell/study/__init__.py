"""A study on disk: its folder, and what makes it safe to be killed and continued.

folder     paths, records and ledgers
keys       what a stage's result depends on
checksums  whether files are still what the stages wrote
lock       one run at a time
"""

from daskcell.study.folder import CLUSTERS, Ledger, Study, check_folder, read_record, sweep, versions

__all__ = ["CLUSTERS", "Ledger", "Study", "check_folder", "read_record", "sweep", "versions"]
