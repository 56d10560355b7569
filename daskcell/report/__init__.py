"""The results of a study on one page: clusters with their cells, slides, known types, seams, failures.

    ledgers, tables, model ──> facts ──┐
    images of cells and slides ────────┴──> page (one self-contained HTML file)

Reads a study and writes one file. Equal results give equal bytes.
"""

from daskcell.report.page import page_inputs, write_report

__all__ = ["page_inputs", "write_report"]
