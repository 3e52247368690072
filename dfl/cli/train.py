"""dfl train RECIPE: run a recipe."""

from dfl.cli.paths import path

HELP = "run a recipe; `--dotted.key value` overrides any of its fields"
OVERRIDES = True


def add(parser) -> None:
    parser.add_argument("recipe", type=path, nargs="?", help="a YAML file; without one, the defaults")
    parser.add_argument("--dry-run", action="store_true",
                        help="check all that needs no weights, print the resolved recipe and its memory, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in the output, if any")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace the run that the output folder holds; files that no run wrote stay")


def run(args, overrides: list[str]) -> int:
    from dfl import config
    from dfl.run import memory
    resolved = config.load(args.recipe, overrides)
    memory.check_peers(resolved)  # before seconds of imports
    if args.dry_run:
        from dfl.run.dryrun import dry_run
        print(dry_run(resolved, resume=args.resume, overwrite=args.overwrite), end="")
        return 0
    from dfl.run.train import train
    return train(resolved, resume=args.resume, overwrite=args.overwrite, spread=True)
