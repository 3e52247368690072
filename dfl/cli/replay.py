"""dfl replay RUN: run again, in one process, what a run with membership: survive has recorded, and compare the bits."""

from dfl.cli.paths import path

HELP = "run a run with membership: survive again from the record of who was there, and compare; 1 where bits differ"


def add(parser) -> None:
    parser.add_argument("run", type=path, help="a run's folder, with its folders process-K")


def run(args, overrides: list[str]) -> int:
    from dfl.run.replay import replay
    found = replay(args.run)
    differ = sorted(set(found.peers) - set(found.equal))
    rows = "the same bits" if not differ else f"peers {', '.join(map(str, differ))} differ"
    there = ", ".join(map(str, found.peers))
    print(f"{found.rounds} rounds; losses the same in {found.losses}; rows of peers {there} at the end: {rows}")
    return 0 if found.all else 1
