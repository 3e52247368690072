"""`dfl watch`: a run or a sweep while it is at work, read from its folder alone.

A terminal gets a frame that is drawn anew (by rich, which knows widths, colours and resizing), anything else a line whenever
something happened. Every look reads the whole file again when it has changed: a resumed run writes a new one.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dfl.report.lines import clock
from dfl.report.runs import choose_metric, evaluated, number, spent
from dfl.store.directory import all_records
from dfl.store.runs import RunData, is_run, is_sweep, read_run

BLOCKS = "▁▂▃▄▅▆▇█"
# rounds over which the time left is estimated, and seconds without news that are mentioned
RECENT, SILENT = 10, 60
# of a frame beside its peers or runs: lines above them, and columns left of the sparkline
HEADER_LINES, HEADER_COLUMNS = 12, 36


class Reader:
    """A run's folder, read again when one of its files has changed."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.run = Path(folder), None, None

    def look(self) -> RunData | None:
        """None while there is no run in the folder."""
        parts = [self.folder, self.folder / "baseline-local"]
        stamps = [_stamp(file) for part in parts for file in (part / "recipe.yaml", part / "run.json", *all_records(part))]
        if stamps != self.seen:
            self.seen, self.run = stamps, read_run(self.folder) if is_run(self.folder) else None
        return self.run


def _stamp(path: Path) -> tuple | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def ended(run: RunData | None) -> bool:
    """The last round is recorded, and that of local training alone where the recipe asks for it."""
    if run is None or not run.finished:
        return False
    return not run.config.get("baseline") or (run.baseline is not None and run.baseline.finished)


def seconds_left(run: RunData) -> float | None:
    """From the seconds of the last rounds, evaluations among them; None before the first round."""
    recent = [r for r in run.records if r["round"] > 0][-RECENT:]
    spent_there = [sum(number(r, "seconds", phase) or 0.0 for phase in r.get("seconds") or {}) for r in recent]
    return sum(spent_there) / len(recent) * (run.total - run.done) if recent and run.total is not None else None


def sparkline(values: list[float | None], width: int) -> str:
    """The last `width` values as blocks between the lowest and the highest of them; a space where there was none."""
    values = values[-width:] if width > 0 else []
    known = [v for v in values if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return "".join(" " if v is None else BLOCKS[round((v - low) / step)] for v in values)


def show(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def status_line(run: RunData, metric: str) -> str:
    """Everything about the last round in a line."""
    last, measured = run.records[-1], [r for r in run.records if r.get("measures")]
    parts = [f"round {run.done}/{run.total or '?'}"]
    loss = number(last, "train_loss", "mean")
    parts += [f"loss {loss:.3f}"] if loss is not None else []
    parts += [f"trains {last['trains']}"] if last.get("trains") else []
    distance = number(measured[-1], "measures", "consensus_distance") if measured else None
    parts += [f"distance {distance:.3g}"] if distance is not None else []
    if evaluated(run, metric):
        latest = evaluated(run, metric)[-1]
        values = [show(number(latest, "eval", metric, key)) for key in ("mean", "min", "max")]
        parts.append(f"{metric} {values[0]} ({values[1]} to {values[2]})")
        consensus = number(latest, "eval", "consensus", metric)
        parts += [f"consensus {show(consensus)}"] if consensus is not None else []
    parts.append(f"sent {spent(run)[last['round']][0] / 1e6:,.1f} MB")
    left = seconds_left(run)
    return "  ".join([*parts, *([f"left {clock(left)}"] if left else [])])


def run_frame(run: RunData | None, folder: Path, width: int = 80, height: int = 24):
    """What rich prints of a run: progress, last round, every peer, on a terminal of that size."""
    from rich.console import Group
    from rich.text import Text
    if run is None:
        return Text(f"{folder}: waiting for the run to begin")
    if not run.records:
        return Group(Text(str(folder), style="bold"), Text("has begun; no round is recorded yet"))
    metric, higher = choose_metric([run], None)
    parts = [Text(str(folder), style="bold"), _bar(run, "")]
    parts += [_bar(run.baseline, "alone")] if run.baseline and run.baseline.records else []
    parts.append(Text(status_line(run, metric)))
    parts += [Text(problem, style="yellow") for problem in run.problems]
    quiet = _quiet(run)
    if not ended(run) and quiet > SILENT:
        parts.append(Text(f"nothing new for {clock(quiet)}", style="yellow"))
    table = _peers(run, metric, higher, min(40, width - HEADER_COLUMNS), height - HEADER_LINES)
    return Group(*parts, *([Text(), table] if table else []))


def _quiet(run: RunData) -> float:
    """Seconds since a round was recorded, of the run or of its local training."""
    stamps = [stamp for folder in (run.folder, run.folder / "baseline-local") if (stamp := _stamp(folder / "metrics.jsonl"))]
    return time.time() - max(modified for _, _, modified in stamps) / 1e9 if stamps else 0.0


def _bar(run: RunData, name: str):
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    left = seconds_left(run)
    said = run.state if run.finished else f"{run.done}/{run.total or '?'}" + (f", left {clock(left)}" if left is not None else "")
    line.add_row(name, ProgressBar(total=run.total or 1, completed=run.done), said)
    return line


def _peers(run: RunData, metric: str, higher: bool, width: int, room: int):
    """The metric of every peer that there is room for: now, best, and as a sparkline of that width."""
    from rich.table import Table
    records = evaluated(run, metric)
    if not records:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("peer", no_wrap=True)
    for name in (metric, "best"):
        table.add_column(name, justify="right", no_wrap=True)
    if width > 0:
        table.add_column("evaluations"[:width], no_wrap=True, overflow="crop")
    better = max if higher else min

    def add(name: str, values: list[float | None]) -> None:
        known = [v for v in values if v is not None]
        spark = [sparkline(values, width)] if width > 0 else []
        table.add_row(name, show(values[-1]), show(better(known)) if known else "–", *spark)

    add("mean", [number(r, "eval", metric, "mean") for r in records])
    if number(records[-1], "eval", "consensus", metric) is not None:
        add("consensus", [number(r, "eval", "consensus", metric) for r in records])
    shown = min(run.num_peers, max(3, room))
    for peer in range(shown):
        add(str(peer), [v[peer] if peer < len(v := r["eval"]["peers"][metric]) else None for r in records])
    if shown < run.num_peers:
        table.add_row(f"{run.num_peers - shown} more")
    return table


class SweepReader:
    """The runs of a sweep: what its folder says of each, and each run's own records."""

    def __init__(self, folder: Path):
        self.folder, self.readers = Path(folder), {}

    def look(self) -> list[tuple]:
        """(entry of the sweep, its RunData or None) for every run."""
        from dfl.store.sweeps import read
        return [(entry, self.readers.setdefault(entry.name, Reader(entry.output)).look()) for entry in read(self.folder)]


def counts(entries: list[tuple]) -> str:
    """`2 finished, 1 begun, 3 waiting of 6 runs`."""
    states = [entry.state for entry, _ in entries]
    named = [f"{states.count(state)} {state}" for state in ("finished", "failed", "begun", "waiting") if state in states]
    return f"{', '.join(named)} of {len(states)} runs"


def sweep_frame(entries: list[tuple], folder: Path, width: int = 80, height: int = 24):
    """What rich prints of a sweep: how many ended, and the runs that there is room for, those at work first."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text
    finished = sum(entry.state == "finished" for entry, _ in entries)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = [("state", 8), ("rounds", 7), ("left", 7), ("last", 6)]
    columns = [column for column in columns if width >= 60 or column[0] != "left"]
    table.add_column("run", no_wrap=True, overflow="ellipsis", max_width=max(8, width - sum(least + 2 for _, least in columns) - 2))
    for name, least in columns:
        table.add_column(name, no_wrap=True, min_width=least, justify="left" if name == "state" else "right")
    order = ["begun", "failed", "waiting", "finished"]
    ordered = sorted(entries, key=lambda pair: order.index(pair[0].state))
    room = max(3, height - HEADER_LINES)
    for entry, run in ordered[:room]:
        left = seconds_left(run) if run and entry.state == "begun" else None
        cells = {"state": entry.state, "rounds": f"{run.done}/{run.total or '?'}" if run else "–",
                 "left": clock(left) if left else "–", "last": _last(run)}
        table.add_row(entry.name, *(cells[name] for name, _ in columns))
    if len(entries) > room:
        table.add_row(f"{len(entries) - room} more")
    errors = [Text(f"{entry.name}: {entry.error}", style="yellow") for entry, _ in entries if entry.state == "failed"]
    return Group(Text(str(folder), style="bold"), Text(counts(entries)), ProgressBar(total=len(entries), completed=finished), Text(),
                 table, *errors[:5])


def _last(run: RunData | None) -> str:
    """The mean over peers of the primary metric."""
    if run is None or not run.records:
        return "–"
    metric, _ = choose_metric([run], None)
    records = evaluated(run, metric)
    return show(number(records[-1], "eval", metric, "mean")) if records else "–"


def watch(folder: Path, *, once: bool = False, every: float = 1.0, stream=None) -> int:
    """Show the run or sweep in `folder` until it has ended; once: as it is now. The exit status.

    ValueError with `once` for a folder that holds no run yet, and where rich is missing and a frame is asked for.
    """
    stream = stream or sys.stdout
    if every <= 0:
        raise ValueError(f"every = {every} must be more than 0 seconds")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, not the folder of a run or of a sweep")
    if once and not is_run(folder) and not is_sweep(folder):
        raise ValueError(f"{str(folder)!r} holds no run (no recipe.yaml in it) and no sweep (no sweep.json in it)")
    try:
        if once:
            console = _console(stream)
            frame, _ = next(_frames(folder, lambda: (console.width, 10_000)))
            console.print(frame)
        elif stream.isatty():
            _draw(folder, every, stream)
        else:
            for line in lines(folder, every):
                print(line, file=stream, flush=True)
    except KeyboardInterrupt:
        pass
    return 0


def _console(stream):
    try:
        from rich.console import Console
    except ImportError:
        raise ValueError("a frame of dfl watch needs rich: pip install 'dfl[report]'; into a pipe it writes plain lines") from None
    console = Console(file=stream, highlight=False)
    console.on_broken_pipe = _broken_pipe
    return console


def _broken_pipe() -> None:
    """Called by rich where a write failed so: as for every other command, and not its own exit with status 1."""
    raise


def _frames(folder: Path, size) -> Iterator[tuple]:
    """(frame, whether all has ended), again and again; size() is that of the terminal, which may change."""
    single, sweep = Reader(folder), SweepReader(folder)
    while True:
        width, height = size()
        if is_sweep(folder):
            entries = sweep.look()
            yield sweep_frame(entries, folder, width, height), all(entry.state in ("finished", "failed") for entry, _ in entries)
        else:
            run = single.look()
            yield run_frame(run, folder, width, height), ended(run)


def _draw(folder: Path, every: float, stream) -> None:
    console = _console(stream)
    from rich.live import Live
    with _between_frames() as interrupted_within, Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        for frame, over in _frames(folder, lambda: (console.width, console.height)):
            live.update(frame, refresh=True)
            if over or interrupted_within(every):
                return


@contextmanager
def _between_frames() -> Iterator[Callable[[float], bool]]:
    """Waits up to so many seconds for Ctrl-C, and says whether it came; a second one raises.

    An exception in the middle of a frame can keep rich from showing the cursor again. Waited for is a pipe that Python's own C handler
    writes into: one in Python runs too late where the signal comes just before the wait, and may take no lock that the wait holds.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are heard there
        yield lambda seconds: bool(time.sleep(seconds))
        return
    heard: list[int] = []

    def hear(number, frame) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    def interrupted_within(seconds: float) -> bool:
        if select.select([reader], [], [], seconds)[0]:
            os.read(reader, 64)  # other signals of this process are told there as well
        return bool(heard)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before, pipe_before = signal.signal(signal.SIGINT, hear), signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield interrupted_within
    finally:
        signal.set_wakeup_fd(pipe_before)
        signal.signal(signal.SIGINT, before)
        os.close(writer)
        os.close(reader)


def lines(folder: Path, every: float) -> Iterator[str]:
    """A line for every evaluation of a run as it comes, or every change in a sweep, until all has ended."""
    single, sweep, said, named = Reader(folder), SweepReader(folder), None, set()
    while True:
        if is_sweep(folder):
            entries = sweep.look()
            text, over = counts(entries), all(entry.state in ("finished", "failed") for entry, _ in entries)
        else:
            run = single.look()
            text, over = _news(run, folder), ended(run)
            for problem in [problem for problem in (run.problems if run and run.records else ()) if problem not in named]:
                named.add(problem)
                yield problem
        if text != said:
            said = text
            yield text
        if over:
            return
        time.sleep(every)


def _news(run: RunData | None, folder: Path) -> str:
    """The line of the last evaluation; the last round's when the run has ended."""
    if run is None:
        return f"{folder}: waiting for the run to begin"
    if not run.records:
        return f"{folder}: has begun; no round is recorded yet"
    metric, _ = choose_metric([run], None)
    last = max((k for k, record in enumerate(run.records) if "eval" in record), default=0)
    shown = run.records if run.finished else run.records[:last + 1]
    return status_line(RunData(run.folder, run.name, run.config, run.about, shown), metric)
