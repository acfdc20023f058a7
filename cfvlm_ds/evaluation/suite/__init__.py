"""Benchmarks that a model is asked: items checked, scored where nothing of them is on disk yet, results kept, shown and compared."""

from __future__ import annotations

from cfvlm_ds.evaluation.suite.asked import Asked, Settings, evaluate_benchmarks, results_held
from cfvlm_ds.evaluation.suite.chosen import Chosen, choose, load_items
from cfvlm_ds.evaluation.suite.comparing import compare_results
from cfvlm_ds.evaluation.suite.item_check import checked_items
from cfvlm_ds.evaluation.suite.tables import markdown, summary
from cfvlm_ds.evaluation.suite.written import Result, bootstrap_of, read_results, recorded, result_folder, write_result

__all__ = [
    "Asked",
    "Chosen",
    "Result",
    "Settings",
    "bootstrap_of",
    "checked_items",
    "choose",
    "compare_results",
    "evaluate_benchmarks",
    "load_items",
    "markdown",
    "read_results",
    "recorded",
    "result_folder",
    "results_held",
    "summary",
    "write_result",
]
