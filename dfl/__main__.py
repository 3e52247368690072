"""The command line: dfl train | eval | list."""

import argparse
import json
import os
import sys
from pathlib import Path

FLAGS = ("--dry-run", "--resume", "--overwrite", "--help")
EXAMPLES = """examples:
  dfl train launch/recipes/quickstart.yaml --rule.T 5 --output runs/five
  torchrun --nproc-per-node 2 -m dfl train launch/recipes/quickstart.yaml
  dfl eval runs/five
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("dfl", description="Decentralised gossip fine-tuning of LoRA factors.", epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run a recipe; `--dotted.key value` overrides any of its fields")
    train.add_argument("recipe", type=Path, nargs="?", help="a YAML file; without one, the defaults")
    train.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in the output, if any")
    train.add_argument("--overwrite", action="store_true", help="replace a run that the output folder holds")
    evaluate = commands.add_parser("eval", help="evaluate the saved adapters of a run again")
    evaluate.add_argument("run", type=Path)
    commands.add_parser("list", help="every rule, topology, codec, task and partition")
    return top


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command with its own flags, and the overrides: all from the first `--key` that is not a flag, the flags taken out."""
    cut = next((k for k, word in enumerate(argv) if word.startswith("--") and word not in FLAGS), len(argv))
    return argv[:cut] + [word for word in argv[cut:] if word in FLAGS], [word for word in argv[cut:] if word not in FLAGS]


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 refused, 75 stopped by a signal with its state saved."""
    words, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    try:
        return {"train": _train, "eval": _eval, "list": _list}[args.command](args, rest)
    except ValueError as error:
        return _fail(error, 2)
    except (OSError, FloatingPointError) as error:
        return _fail(error, 1)


def _fail(error: Exception, status: int) -> int:
    """One line; the whole trace with DFL_TRACEBACK=1.

    All processes refuse alike, so the first speaks for them; what happened to one it says itself.
    """
    if os.environ.get("DFL_TRACEBACK") == "1":
        raise error
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" or not isinstance(error, ValueError):
        print(f"dfl: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


def _train(args, rest) -> int:
    from dfl import config
    resolved = config.load(args.recipe, rest)
    if args.dry_run:
        import yaml

        from dfl.assemble import check
        check(resolved)
        print(yaml.safe_dump(resolved.to_dict(), sort_keys=False), end="")
        return 0
    from dfl.train import train
    return train(resolved, resume=args.resume, overwrite=args.overwrite)


def _eval(args, rest) -> int:
    from dfl.train import evaluate_run
    result = evaluate_run(args.run, rest)
    if result is not None:
        print(json.dumps(result, indent=1))
    return 0


def _list(args, rest) -> int:
    import topologies
    from dfl import codecs, partition, rules, tasks
    for kind, table in (("rules", rules.describe()), ("topologies", topologies.describe()), ("codecs", codecs.describe()),
                        ("tasks", tasks.describe()), ("data sources", tasks.describe(tasks.SOURCES)),
                        ("partitions", partition.describe())):
        print(f"{kind}:")
        width = max(map(len, table))
        for name, line in table.items():
            print(f"  {name.ljust(width)}  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
