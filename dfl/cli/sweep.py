"""dfl sweep SWEEP: a recipe over a grid of fields."""

import shlex

from dfl.cli.paths import path

HELP = "run a recipe over a grid of its fields; `--dotted.key value` overrides a field in all runs"
OVERRIDES = True


def add(parser) -> None:
    parser.add_argument("sweep", type=path, help="a YAML file with recipe, grid (or together), output; maybe exclude, include")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how far each has come, and stop")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (1); with --slurm, at most so many")
    parser.add_argument("--processes", type=int, metavar="K",
                        help="processes of each run, under torchrun; without it each has its share of the cores for its own")
    parser.add_argument("--retries", type=int, default=1, metavar="R", help="how often a failed run is tried again (1)")
    parser.add_argument("--index", type=int, metavar="I", help="only run number I, from this process")
    parser.add_argument("--slurm", action="store_true", help="submit launch/slurm/sweep.sbatch as an array, one task a run")
    parser.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="for sbatch, such as time=2:00:00")
    parser.add_argument("--overwrite", action="store_true", help="begin again: remove the runs of a sweep that the output holds")


def run(args, overrides: list[str]) -> int:
    from dfl import sweep as sweeps
    _refuse_together(args)
    sweep = sweeps.load(args.sweep, overrides)
    indices = range(len(sweep.cells)) if args.index is None else [args.index]
    if args.index is not None and args.index not in range(len(sweep.cells)):
        raise ValueError(f"--index {args.index} is not allowed; the sweep has runs 0 to {len(sweep.cells) - 1}")
    resources = sweeps.Resources(1 if args.jobs is None else args.jobs, args.processes, args.retries)
    resources.check()
    sweeps.check(sweep, indices, args.processes or 1, execute=not args.dry_run)
    runs = sweeps.plan(sweep, overwrite=args.overwrite)
    command = sweeps.array_command(len(runs), args.sweep, overrides, args.sbatch, args.jobs) if args.slurm else []
    if args.dry_run:
        print(sweeps.listing([runs[index] for index in indices]), *([shlex.join(command)] if command else []), sep="\n")
        return 0
    if args.index is not None:
        return sweeps.run_here(sweep, runs, args.index)
    sweeps.write(sweep, runs, overwrite=args.overwrite)
    if args.slurm:
        print(sweeps.submit(command))
        return 0
    return sweeps.Runner(runs, resources).run()


def _refuse_together(args) -> None:
    if args.index is not None and (args.slurm or args.overwrite):
        raise ValueError(f"--index {args.index} runs one run here; allowed: without --slurm and --overwrite")
    if args.sbatch and not args.slurm:
        raise ValueError(f"--sbatch {args.sbatch[0]} is an option for Slurm; allowed: with --slurm")
