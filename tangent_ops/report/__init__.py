"""Reports of runs: what is in them, how accurate they are, and what was forgotten, as a page."""

from tangent_ops.report.collect import RunReport, collect
from tangent_ops.report.page import page_of, write_page

__all__ = ["RunReport", "collect", "page_of", "write_page"]
