"""dfl plan RECIPE: which topology, method, codec, trigger and interval reach a target soonest on a network."""

import json
import sys

from dfl.cli.paths import path

HELP = "predict seconds and bytes to a target for combinations of a recipe's slots; --compare holds a plan against runs"
OVERRIDES = True
LISTS = ("topologies", "methods", "codecs", "triggers", "intervals")


def add(parser) -> None:
    parser.add_argument("paths", type=path, nargs="+", metavar="RECIPE", help="a YAML file; with --compare, runs or sweeps")
    parser.add_argument("--bandwidth", type=float, metavar="MBIT", help="of every link, in Mbit/s")
    parser.add_argument("--latency", type=float, metavar="MS", help="of every link, in milliseconds")
    parser.add_argument("--target", type=float, metavar="VALUE", help="of the recipe's first metric, mean over peers")
    parser.add_argument("--metric", metavar="NAME", help="instead of the recipe's first")
    for name in LISTS:
        what = "train.local_steps" if name == "intervals" else "as in a recipe"
        parser.add_argument(f"--{name}", metavar="A,B", help=f"to compare, {what}; else the recipe's own beside a few usual ones")
    parser.add_argument("--probe", type=int, metavar="ROUNDS",
                        help="rounds to measure of each method and interval (a quarter of the recipe's)")
    parser.add_argument("--step-seconds", type=float, metavar="S", help="of a local step of a peer where it will run; else as here")
    parser.add_argument("--by", choices=("seconds", "bytes"), default="seconds", help="what ranks (seconds)")
    parser.add_argument("--output", type=path, metavar="FOLDER", help="for plan.json and plan.md (the recipe's output, with -plan)")
    parser.add_argument("--overwrite", action="store_true", help="replace the plan that the folder holds")
    parser.add_argument("--compare", type=path, metavar="PLAN", help="how far a plan.json was from what these runs took")


def run(args, overrides: list[str]) -> int:
    if args.compare is not None:
        return _compare(args, overrides)
    for name in ("bandwidth", "latency", "target"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; allowed: a number")
    if len(args.paths) > 1:
        raise ValueError(f"{len(args.paths)} recipes; allowed: one, or runs with --compare PLAN")
    from dfl.plan import table
    from dfl.plan.ask import Ask
    from dfl.plan.build import write_plan
    ask = Ask(args.bandwidth, args.latency, args.target, args.metric, args.step_seconds, args.probe,
              {name: getattr(args, name) for name in LISTS}, args.by)
    found = write_plan(args.paths[0], overrides, ask, args.output, overwrite=args.overwrite,
                       say=lambda text: print(text, file=sys.stderr, flush=True))
    print(*table.lines(found), sep="\n")
    return 0


def _compare(args, overrides: list[str]) -> int:
    if overrides:
        raise ValueError(f"{overrides[0]} is for a recipe; allowed with --compare: --output")
    from dfl.plan.compare import compared, lines
    found = compared(args.compare, args.paths)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "compared.json").write_text(json.dumps(found, indent=1) + "\n")
    print(*lines(found), sep="\n")
    return 0
