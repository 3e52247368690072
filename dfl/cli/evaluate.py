"""dfl eval TARGET: evaluate a run, a checkpoint or one model again."""

import json

from dfl.cli.paths import path

HELP = "evaluate a run, a checkpoint, an adapter or an exported model, on the run's own examples or on a file"
OVERRIDES = True


def add(parser) -> None:
    parser.add_argument("target", type=path, help="a run, a checkpoint, a peer's adapter, an exported adapter or a whole model")
    parser.add_argument("--data", metavar="FILE", help="examples of your own: csv, tsv, jsonl or parquet; --data.text, "
                        "--data.label ... name its columns where they differ from the run's")
    parser.add_argument("--peer", metavar="PEER", help="of a run or checkpoint: one model alone, a number or consensus")
    parser.add_argument("--round", metavar="N", type=int, help="of a run: the checkpoint after so many rounds, in place of the last")
    parser.add_argument("--run", metavar="RUN", type=path, help="of an exported model: the run whose evaluation examples it gets")
    parser.add_argument("--predictions", metavar="FILE", type=path, help="write what one model says to each example, as JSON lines")


def run(args, overrides: list[str]) -> int:
    from dfl.run.evaluation import evaluate_target
    result = evaluate_target(args.target, overrides, data=args.data, run=args.run, peer=args.peer, rounds=args.round,
                             predictions=args.predictions, spread=True)
    if result is not None:
        print(json.dumps(result, indent=1))
    return 0
