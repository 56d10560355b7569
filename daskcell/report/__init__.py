"""What a study found, as one page for people: types with their cells, slides, truth, seams, failures.

    ledgers, tables, model ──> facts ──┐
    pictures of typical cells, slides ─┴──> page (one HTML file that needs nothing else)

Reads a study and writes one file. The same results give the same bytes.
"""

from daskcell.report.page import page_inputs, write_report

__all__ = ["page_inputs", "write_report"]
