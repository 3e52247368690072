"""Plans: what reaches a target on a network soonest, from a few measured rounds and the mixing matrices.

`probe` trains a few rounds of each method and interval and measures; `rehearsal` does rounds of every combination on the measured
rows, without a model, for bytes and seconds; `model` makes of both the rounds to the target, and says what it takes for granted;
`compare` holds a plan against runs.
"""

from dfl.plan.build import write_plan
from dfl.plan.compare import compared

__all__ = ["compared", "write_plan"]
