"""dfl collect RUN [FOLDER ...]: the folders of processes that kept one each as one run."""

from dfl.cli.paths import path

HELP = "join the folders process-K of a run with membership: survive, for report, eval and export"


def add(parser) -> None:
    parser.add_argument("run", type=path, help="the run's folder")
    parser.add_argument("folders", type=path, nargs="*", help="folders process-K from elsewhere; without them, those in RUN")


def run(args, overrides: list[str]) -> int:
    from dfl.store.collect import collect
    rounds, peers = collect(args.run, args.folders)
    print(f"{args.run}: {rounds} rounds; checkpoint of peers {', '.join(map(str, peers)) or 'none'}")
    return 0
