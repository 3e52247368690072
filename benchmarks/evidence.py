"""The evidence study: which method wins, when and why, by the protocol in evidence/PROTOCOL.md.

    DFL_DATA=... python benchmarks/evidence.py run --out DIR [--jobs 2] [--budget-hours 4] [--only REGEX] [--phase core]
    python benchmarks/evidence.py list --out DIR       # every cell that can be run now, and what is done
    python benchmarks/evidence.py collect --out DIR    # results/evidence.json from what is done
    python benchmarks/evidence.py restore --out DIR    # the cells of results/evidence.json into DIR: another machine goes on
    python benchmarks/evidence.py page               # the page, and the tables of two README.md, from results/evidence.json

Killed and started again it goes on: with the cells that are not done, and within a cell from the last checkpoint of its
run.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # also where a test imports it; behind tests, which have an every_rule

from evidence import page, runner, tables
from evidence.grid import PHASES, plan

from dfl.run.description import describe_run

RESULTS = Path(__file__).parent / "results" / "evidence.json"
DOCUMENTS = (Path(__file__).parent / "README.md", Path(__file__).parent.parent / "README.md")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return {"run": run, "list": show, "collect": collect, "restore": restore, "page": write_page}[args.command](args)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "list", "collect", "restore", "page"))
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="run directories and finished cells")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--budget-hours", type=float, help="then the runs at work save their state and stop")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose names it is found in")
    parser.add_argument("--phase", nargs="*", default=[], choices=list(PHASES),
                        help="none: all, in the protocol's order")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence.html"), help="of the page")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    runner.check_data()
    budget = None if args.budget_hours is None else 3600 * args.budget_hours
    return runner.run(args.out.absolute(), args.jobs, budget, tuple(args.phase), args.only)


def show(args: argparse.Namespace) -> int:
    found = runner.stored(args.out)
    cells = {cell.name: cell for cell in plan(found, tuple(args.phase))}
    waiting = runner.ready(found, tuple(args.phase), args.only)
    for name in cells:
        if name in found:
            said = found[name].get("test") or found[name].get("final")
            print(f"done     {name}  " + ("diverged" if said is None else f"{100 * said['mean']:.1f}"))
    for cell in waiting:
        print(f"to do    {cell.name}")
    done = sum(name in found for name in cells)
    print(f"{done} done, {len(waiting)} can be run now; more follow where rates are to be chosen")
    return 0


def collect(args: argparse.Namespace) -> int:
    found = runner.stored(args.out)
    ordered = {cell.name: found[cell.name] for cell in plan(found) if cell.name in found}
    stamp = describe_run({}, {})
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"command": "python benchmarks/evidence.py collect", "collected": now, "git_commit": stamp["git_commit"],
             "cells": ordered}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")
    print(f"written: {RESULTS}, {len(ordered)} cells")
    return 0


def restore(args: argparse.Namespace) -> int:
    done, known = runner.stored(args.out), json.loads(RESULTS.read_text())["cells"]
    missing = known.keys() - done.keys()
    for name in missing:
        runner.keep(args.out, name, known[name])
    print(f"restored: {len(missing)} cells to {args.out}, beside {len(done)} that were there")
    return 0


def write_page(args: argparse.Namespace) -> int:
    found = json.loads(RESULTS.read_text())["cells"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page.html(found))
    for document in DOCUMENTS:
        document.write_text(tables.with_tables(document.read_text(), found))
    print(f"written: {args.output}, {', '.join(map(str, DOCUMENTS))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
