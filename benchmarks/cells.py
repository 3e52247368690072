"""A study of many runs: its command line, and a cell, that is a run and what is kept of it in a file beside its folder, so that a
study goes on where it was stopped."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dfl


def finish(stored: Path, recipe: Path, regime: Mapping[str, Any], summarise: Callable[[list[dict]], Any], **fields: Any) -> Any:
    """What `summarise` makes of the records of the run, once it has ended; None where `stored` is there already. regime: fields by
    their dotted names. SystemExit(75) where the run was stopped."""
    if stored.exists():
        return None
    given = {key.replace(".", "__"): value for key, value in regime.items()}
    done = dfl.train(recipe, resume=True, output=str(stored.with_suffix("")), **given | fields)
    if not done.finished:
        raise SystemExit(75)
    found, torn = summarise(done.metrics), stored.with_name(stored.name + ".part")
    torn.write_text(json.dumps(found, indent=1))
    torn.replace(stored)
    return found


def command(about: str, out: str, **actions: Callable) -> None:
    """The command line of a study with the action that is asked for. `table` takes nothing and is printed; the others take the folder
    --out, and those that train (`run`, `data`) need DFL_DATA."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(actions))
    parser.add_argument("--out", type=Path, default=Path(out), help="of the runs and of what is kept of them (%(default)s)")
    args = parser.parse_args()
    if args.what == "table":
        print(actions["table"]())
        return
    if args.what in ("run", "data") and not os.environ.get("DFL_DATA"):
        sys.exit("set DFL_DATA to the folder with the data and the models that the heads of launch/recipes describe")
    actions[args.what](args.out)
