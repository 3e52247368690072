"""The command line: one module a command, each with `add(parser)` and `run(args, overrides) -> exit status`."""

import argparse
import os
import sys
from importlib import import_module
from types import ModuleType

from dfl.cli.pipes import ends_quietly
from dfl.run.callbacks import CallbackError
from dfl.run.parent import end_with_launcher

# command -> module; they load nothing heavy until their command runs
COMMANDS = {"train": "train", "eval": "evaluate", "export": "export", "sweep": "sweep", "list": "listing", "report": "report",
            "watch": "watch", "generate": "generate", "collect": "collect", "replay": "replay",
            "certificates": "certificates", "plan": "plan"}
EXAMPLES = """examples:
  dfl train launch/recipes/quickstart.yaml --method.T 5 --output runs/five
  torchrun --nproc-per-node 2 -m dfl train launch/recipes/quickstart.yaml
  dfl sweep launch/recipes/sweep.yaml --jobs 2
  dfl plan launch/recipes/quickstart.yaml --bandwidth 50 --latency 50 --target 0.6
  dfl eval runs/five --data mine.csv --peer 3 --predictions said.jsonl
  dfl export runs/five --peer consensus --merge
  dfl generate runs/chat "What is a graph?" --peer 3
  dfl watch runs/five
  dfl report runs/five runs/ten --target 0.6
"""


def module(command: str) -> ModuleType:
    return import_module(f"dfl.cli.{COMMANDS[command]}")


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and that of each command."""
    top = argparse.ArgumentParser("dfl", description="Decentralised gossip fine-tuning of LoRA factors.", epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True)
    made = {}
    for name in COMMANDS:
        made[name] = commands.add_parser(name, help=module(name).HELP, description=module(name).HELP, allow_abbrev=False)
        module(name).add(made[name])
    return top, made


def split_overrides(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """What `parser` knows, and the `--dotted.key value` overrides beside it."""
    known, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        option = parser._option_string_actions.get(word.partition("=")[0])
        mine = known if option or not word.startswith("--") else overrides
        mine.append(word)
        takes_value = option.nargs != 0 if option else word.startswith("--")
        if takes_value and "=" not in word and rest:
            mine.append(rest.pop(0))
    return known, overrides


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 refused, 75 stopped by a signal with its state saved, 141 nobody reads what it prints."""
    end_with_launcher()  # before anything that takes time is imported
    try:
        return ends_quietly(lambda: _main(argv))
    except BrokenPipeError as error:
        return _fail(error, 1)


def _main(argv: list[str] | None) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost process is one line of ours, not pages of C++ frames
    for library in ("OPENBLAS", "MKL"):  # numpy's, read when it is loaded: a graph's weights must not depend on the cores either
        os.environ.setdefault(f"{library}_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    words = list(sys.argv[1:] if argv is None else argv)
    top, made = make_parser()
    overrides: list[str] = []
    if words and words[0] in made and getattr(module(words[0]), "OVERRIDES", False):
        known, overrides = split_overrides(words[1:], made[words[0]])
        words = [words[0], *known]
    args = top.parse_args(words)
    try:
        return module(args.command).run(args, overrides)
    except ValueError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        raise
    except (OSError, FloatingPointError, CallbackError) as error:
        return _fail(error, 1)


def _fail(error: Exception, status: int) -> int:
    """One line; the whole trace with DFL_TRACEBACK=1.

    All processes refuse alike, so the first speaks for them; what happened to one it says itself.
    """
    if os.environ.get("DFL_TRACEBACK") == "1":
        raise error
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" or not isinstance(error, (ValueError, CallbackError)):
        print(f"dfl: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status
