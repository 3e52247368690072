"""Sweeps: one recipe over a grid of fields, a folder a run, here or on a cluster.

A sweep's folder holds `sweep.json` (which runs there are, in their order), a folder for each run, `logs/` with the output of each
run, and `recipes/` with the resolved recipe that each was started from.
"""

from dfl.store.sweeps import SweepRun, read
from dfl.sweep.grid import Cell, Sweep, check, load
from dfl.sweep.local import Resources, Runner, run_here
from dfl.sweep.manifest import listing, plan, write
from dfl.sweep.slurm import array_command, submit

__all__ = ["Cell", "Resources", "Runner", "Sweep", "SweepRun", "array_command", "check", "listing", "load", "plan", "read", "run_here",
           "submit", "write"]
