"""What every committed result carries: what was run, on what, from which commit, when."""

import json
import sys
from pathlib import Path

from dfl.run.description import describe_run

RESULTS = Path(__file__).parent / "results"


def write(name: str, config: dict, results) -> Path:
    """`results/NAME.json`: the command, the configuration, versions, hardware, commit and date, then the results."""
    about = describe_run(config, {})
    stamped = {"command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(portable, sys.argv[1:])]),
               **{key: about[key] for key in ("config", "versions", "hardware", "git_commit", "started")}, "results": results}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(stamped, indent=1) + "\n")
    print(f"written: {path}")
    return path


def portable(argument: str) -> str:
    """DIR in place of a path that only the machine has on which it was run."""
    return "DIR" if Path(argument).is_absolute() else argument
