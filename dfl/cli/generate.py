"""dfl generate RUN PROMPT ...: what one model of a run says."""

from dfl.cli.paths import path

HELP = "what one model of a language model's run says to prompts"
OVERRIDES = True


def add(parser) -> None:
    parser.add_argument("run", type=path, help="a run, or a folder of dfl export, which stock transformers then reads")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--peer", metavar="PEER", default="consensus", help="a number, or consensus (the default)")
    parser.add_argument("--round", metavar="N", type=int, help="the checkpoint after so many rounds, in place of the last")
    parser.add_argument("--best", action="store_true", help="the best model of the evaluations (checkpoint.best)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="of an answer (128)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0, the default: greedy; else tokens are drawn")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="draw among the likeliest tokens of this share (1)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the draw (0)")


def run(args, overrides: list[str]) -> int:
    from dfl.run.generation import generate
    said = generate(args.run, args.prompts, overrides, peer=args.peer, rounds=args.round, best=args.best,
                    max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    print("\n\n".join(said))
    return 0
