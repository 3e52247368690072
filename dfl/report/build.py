"""`dfl report`: from folders to a page and its tables."""

import math
from pathlib import Path

from dfl.report import several, single
from dfl.report.page import markdown, page
from dfl.report.runs import choose_metric
from dfl.store.directory import REPORT_MARK, made_by_report
from dfl.store.runs import RunData, read_all


def write_report(folders: list[Path], output: Path | None = None, tables: Path | None = None, *, metric: str | None = None,
                 baseline: str | None = None, targets: list[float] = ()) -> list[Path]:
    """Write the page and its tables; where they are. ValueError for a folder that holds no run, an unknown metric or method."""
    bad = [target for target in targets if not math.isfinite(target)]
    if bad:
        raise ValueError(f"target = {bad[0]} is no number to reach; allowed: finite numbers")
    runs, notes = read_all(folders)
    one_run = runs[0] if len(folders) == 1 and len(runs) == 1 and not notes else None
    output = output or _ours((Path(folders[0]) if len(folders) == 1 else Path()) / "report.html", "--output")
    tables = tables or _ours(output.with_suffix(".md"), "--markdown")
    if output.is_dir() or tables.is_dir() or output.resolve() == tables.resolve():
        raise ValueError(f"output = {str(output)!r} and markdown = {str(tables)!r} must be two files")
    if one_run and baseline:
        raise ValueError(f"baseline = {baseline!r} needs several runs to compare; got one")
    name, higher = choose_metric(runs, metric)
    targets = list(targets) or single.default_targets([r for run in runs for r in (run, run.baseline) if r], name, higher)
    parts = _one(one_run, name, higher, targets) if one_run else _many(folders, runs, notes, name, higher, baseline, targets)
    tables_text = markdown(parts["title"], parts["lead"], parts["warnings"], parts["sections"])
    texts = page(**parts), f"{tables_text}\n<!-- {REPORT_MARK} -->\n"
    for path, text in zip((output, tables), texts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [output, tables]


def _ours(path: Path, option: str) -> Path:
    """Without being asked, only a report is replaced."""
    if path.is_file() and not made_by_report(path):
        raise ValueError(f"{str(path)!r} is there, and was not {REPORT_MARK}; to replace it, name it with {option}")
    return path


def _one(run: RunData, metric: str, higher: bool, targets: list[float]) -> dict:
    method, topology = (single.plugin(run.config.get(key)) or "?" for key in ("method", "topology"))
    warnings = list(run.problems) if run.finished else [f"This run is not finished: {run.state}.", *run.problems]
    if run.baseline and not run.baseline.finished:
        warnings.append(f"Its local training alone is not finished: {run.baseline.state}.")
    return {"title": f"Run {run.name}", "lead": f"Method {method} on topology {topology}, {run.config.get('peers', '?')} peers.",
            "warnings": warnings, "tiles": single.tiles(run, metric, higher),
            "sections": single.sections(run, metric, higher, targets)}


def _many(folders, runs, notes, metric, higher, baseline, targets) -> dict:
    title = f"Sweep {Path(folders[0]).resolve().name}" if len(folders) == 1 else f"{len(runs)} runs"
    return {"title": title, **several.parts(runs, notes, metric, higher, baseline, targets)}
