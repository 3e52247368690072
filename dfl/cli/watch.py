"""dfl watch RUN: a run or a sweep while it is at work."""

from dfl.cli.paths import path

HELP = "a live view of a run or a sweep, until it has ended (or Ctrl-C)"


def add(parser) -> None:
    parser.add_argument("folder", type=path, metavar="RUN_OR_SWEEP")
    parser.add_argument("--once", action="store_true", help="print it as it is now, and stop")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often to look (1)")


def run(args, overrides: list[str]) -> int:
    from dfl.report.live import watch
    return watch(args.folder, once=args.once, every=args.every)
