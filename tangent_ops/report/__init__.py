"""Reports of runs: what is in them, how accurate they are, and what was forgotten, as a page."""

from tangent_ops.report.page import page_of, write_page
from tangent_ops.report.run_report import RunReport, collect

__all__ = ["RunReport", "collect", "page_of", "write_page"]
