"""dfl report RUN ...: one HTML page and one Markdown table of runs and sweeps."""

from dfl.cli.paths import path

HELP = "one HTML page, and Markdown tables, of a run, of several, or of a sweep"


def add(parser) -> None:
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN_OR_SWEEP")
    parser.add_argument("--output", type=path, help="the page; without it report.html in the one run or sweep, or here")
    parser.add_argument("--markdown", type=path, help="the tables; without it the page's name with .md")
    parser.add_argument("--metric", help="instead of the task's primary metric")
    parser.add_argument("--baseline", metavar="RULE", help="compare the others with this one; without it lora, or else local")
    parser.add_argument("--target", type=float, action="append", default=[],
                        help="when was the mean over peers there first? may be given several times")


def run(args, overrides: list[str]) -> int:
    from dfl.report.build import write_report
    written = write_report(args.runs, args.output, args.markdown, metric=args.metric, baseline=args.baseline, targets=args.target)
    print(*written, sep="\n")
    return 0
