"""One command for a GPU: checks first, then figures, each part in a process of its own that may fail, hang or crash alone.

A part is a function of a `Setting`, in `checks`, `together` (several processes) or `speed`; `parts` lists them in order with their
time limits, `runner` runs them and stamps what each has said by then. Nothing here is imported by the framework.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# scripts beside this folder, and of the tests tiny models and runs and every rule on rows: what tests hold on CPUs is checked here
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]
