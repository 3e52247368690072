"""What a run did, for people: lines and tables on a terminal, one HTML page, one Markdown table, a live view."""

from dfl.report.lines import align, best, closing_table, evaluation_line, how_to_load, round_line, training_line

__all__ = ["align", "best", "closing_table", "evaluation_line", "how_to_load", "round_line", "training_line"]
