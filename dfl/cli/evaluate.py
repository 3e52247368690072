"""dfl eval RUN: evaluate the saved adapters of a run again."""

import json
from pathlib import Path

HELP = "evaluate the saved adapters of a run again"
OVERRIDES = True


def add(parser) -> None:
    parser.add_argument("run", type=Path)


def run(args, overrides: list[str]) -> int:
    from dfl.train import evaluate_run
    result = evaluate_run(args.run, overrides)
    if result is not None:
        print(json.dumps(result, indent=1))
    return 0
