"""Reports: what a network costs, tables of a run, curves, result files.

Counts are measured on the network at hand; nothing is typed in.
"""

from __future__ import annotations

from cnnjax.report.branches import merge_branches
from cnnjax.report.compare import compare, comparison_table
from cnnjax.report.cost import effective_macs, measure, sparse_bytes
from cnnjax.report.environment import environment
from cnnjax.report.floors import check_floors, floor_line, floor_of, floors_table
from cnnjax.report.plots import plot_curve
from cnnjax.report.results import (
    FORMAT,
    TABLE,
    read_result,
    result_record,
    summarize,
    update_header,
    write_result,
)
from cnnjax.report.tables import (
    human,
    markdown_table,
    results_table,
    run_table,
    spread,
    surgery_table,
    text_table,
)
from cnnjax.report.transfer import cache_table, throughput_table, transfer_table

__all__ = [
    "FORMAT",
    "TABLE",
    "cache_table",
    "check_floors",
    "compare",
    "comparison_table",
    "effective_macs",
    "environment",
    "floor_line",
    "floor_of",
    "floors_table",
    "human",
    "markdown_table",
    "measure",
    "merge_branches",
    "plot_curve",
    "read_result",
    "result_record",
    "results_table",
    "run_table",
    "sparse_bytes",
    "spread",
    "summarize",
    "surgery_table",
    "text_table",
    "throughput_table",
    "transfer_table",
    "update_header",
    "write_result",
]
