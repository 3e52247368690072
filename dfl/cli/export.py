"""dfl export RUN: one model of a run as a folder for others."""

from dfl.cli.paths import path

HELP = "one model of a run as a PEFT folder or a merged model, with a model card; uploads it on request"
OVERRIDES = True


def add(parser) -> None:
    parser.add_argument("run", type=path)
    parser.add_argument("--peer", metavar="PEER", default="consensus", help="a number, or consensus (the default)")
    parser.add_argument("--output", metavar="FOLDER", type=path, help="default: a folder in RUN/exports")
    parser.add_argument("--round", metavar="N", type=int, help="the checkpoint after so many rounds, in place of the last")
    parser.add_argument("--best", action="store_true", help="the best model of the evaluations (checkpoint.best)")
    parser.add_argument("--rank", metavar="R", type=int, help="refactor the factors to this rank, and say what is lost")
    parser.add_argument("--merge", action="store_true", help="a whole model in place of an adapter")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="of a merged model; auto: as the base model was loaded in the run")
    parser.add_argument("--shard-size", metavar="SIZE", default="5GB", help="the largest file of a merged model (default 5GB)")
    parser.add_argument("--base", metavar="NAME", help="what the adapter calls its base model; default: as in the run")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the repository on the hub private")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that the folder holds")


def run(args, overrides: list[str]) -> int:
    from dfl.export import Wish, export, lines
    wish = Wish(args.peer, args.output, args.round, args.rank, args.merge, args.dtype, args.shard_size, args.base, args.push,
                args.private, args.overwrite, args.best)
    print("\n".join(lines(export(args.run, wish, overrides))))
    return 0
