"""The report: one self-contained HTML page made of results (`page`), what it says in words (`text`), and reading results (`sources`)."""

from sink_circuits.report.page import render, write_report
from sink_circuits.report.sources import read_results, sinks_of

__all__ = ["read_results", "render", "sinks_of", "write_report"]
