"""dfl train RECIPE: run a recipe."""

from dfl.cli.paths import path

HELP = "run a recipe; `--dotted.key value` overrides any of its fields"
OVERRIDES = True


def add(parser) -> None:
    parser.add_argument("recipe", type=path, nargs="?", help="a YAML file; without one, the defaults")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in the output, if any")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that the output folder holds")


def run(args, overrides: list[str]) -> int:
    from dfl import config
    resolved = config.load(args.recipe, overrides)
    if args.dry_run:
        import yaml

        from dfl.assemble import check
        from dfl.callbacks import load_callbacks
        check(resolved)
        load_callbacks(resolved.callbacks)
        print(yaml.safe_dump(resolved.to_dict(), sort_keys=False), end="")
        return 0
    from dfl.running import train
    return train(resolved, resume=args.resume, overwrite=args.overwrite, spread=True)
