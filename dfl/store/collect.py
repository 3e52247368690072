"""The folders of processes that kept one each, RUN/process-K, as the folder of one run: for reports, evaluation and export.

Nothing in the folders of the processes is changed. What a process wrote of a round in which it was not there any more, as the others
began it again without it, is left out.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfl.store import manifest
from dfl.store.checkpoints import complete, folder_of, rounds_of
from dfl.store.directory import clear, mark, marked, records_of
from dfl.store.jsonlines import scan
from dfl.store.manifest import Manifest, digest_of_file
from dfl.store.records import of_peers
from dfl.store.runs import read_description

_FOLDER = re.compile(r"process-(\d+)")


class History(NamedTuple):
    """folders, records: by process; first: a process of the run that had the most peers at the end, and among these one whose record
    goes furthest; lines: by round, its record, and where it was not there, that of one which was. What processes recorded that went
    on without the others, and then came back to them, is not among the lines."""

    folders: dict[int, Path]
    records: dict[int, dict[int, dict[str, Any]]]
    first: int
    lines: dict[int, dict[str, Any]]

    def folder_of_peer(self, peer: int) -> Path:
        return self.folders[next(k for k, lines in self.records.items() if any(peer in line["hosted"] for line in lines.values()))]

    def losses(self, t: int) -> dict[int, float]:
        """Of the peers that were there in round t, as they recorded them."""
        found: dict[int, float] = {}
        for lines in self.records.values():
            if t in lines and set(lines[t]["hosted"]) <= set(self.lines[t]["alive"]):
                found |= dict(zip(lines[t]["hosted"], lines[t]["train_loss_peers"], strict=True))
        return dict(sorted(found.items()))


def process_folders(run: Path, given: Sequence[Path] = ()) -> dict[int, Path]:
    """By process: those given, or RUN/process-K. ValueError where there are none, or two of one process."""
    found: dict[int, Path] = {}
    for folder in given or (sorted(run.iterdir()) if run.is_dir() else ()):
        match = _FOLDER.fullmatch(folder.resolve().name)
        if match is None or not folder.is_dir():
            if given:
                raise ValueError(f"{str(folder)!r} is not the folder of a process, whose name is process-K")
            continue
        if int(match[1]) in found:
            raise ValueError(f"{str(folder)!r} and {str(found[int(match[1])])!r} are both of process {match[1]}")
        found[int(match[1])] = folder
    if not found:
        raise ValueError(f"{str(run)!r} holds no folders process-K, which a run with membership: survive leaves")
    return found


def history(run: Path, given: Sequence[Path] = ()) -> History:
    """What the processes of a run have recorded. ValueError where nobody recorded a round."""
    folders = process_folders(run, given)
    records = {}
    for process, folder in folders.items():
        path = folder / records_of(0)
        read = scan(path.read_bytes()).records if path.exists() else []
        whole = {line["round"]: {"hosted": [], **line} for line in read if isinstance(line.get("alive"), list)}
        records[process] = whole
    order = sorted((process for process in records if records[process]), key=lambda process: _end(records, process))
    lines = _way_to(order, records) if order else {}
    if not lines:
        raise ValueError(f"no process of {str(run)!r} has recorded a round yet")
    return History(folders, records, order[0], dict(sorted(lines.items())))


def _end(records: Mapping[int, Mapping[int, dict[str, Any]]], process: int) -> tuple[bool, int, int, int]:
    """Less for those that the run ended with: nobody who was there with it went on from its last round, as it was or, where no more
    have recorded it so, done again without others; most of those that were there have recorded it as it has; and it is far."""
    last = max(records[process])
    alive = records[process][last]["alive"]
    went_on = any(max(lines, default=-1) > last and last in lines and lines[last]["alive"] == alive for lines in records.values())
    there = [lines for lines in records.values() if lines and (hosted := lines[max(lines)]["hosted"]) and set(hosted) <= set(alive)]
    alike = [last in lines and lines[last]["alive"] == alive for lines in there]
    again = [last in lines and lines[last]["alive"] != alive for lines in there]
    further = sum(did and max(lines) > last for did, lines in zip(again, there, strict=True))
    # who has not come so far was there, for all that is known
    return went_on or further >= sum(alike), sum(again) - len(there), -last, process


def _way_to(order: Sequence[int], records: Mapping[int, Mapping[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """The lines that led to the last one of the first process, from there back: who was there in a round, and had not come in it, was
    there in the round before."""
    last = max(records[order[0]])
    lines = {last: records[order[0]][last]}
    for t in range(last - 1, -1, -1):
        later = lines[t + 1] if t + 1 in lines else {"alive": [], "came": {}}
        stayed = set(later["alive"]) - set(map(int, later.get("came", {})))
        told = [records[process][t] for process in order if t in records[process]]
        told = [line for line in told if set(line["hosted"]) <= set(line["alive"])]
        led = [line for line in told if line["hosted"] and set(line["hosted"]) <= stayed] or told
        if led:
            lines[t] = led[0]
    return lines


def collect(run: Path, given: Sequence[Path] = ()) -> tuple[int, list[int]]:
    """Join the folders of the processes in RUN; the rounds that were run, and the peers of its checkpoint.

    ValueError for a RUN that holds something else than what an earlier call has made there.
    """
    found = history(run, given)
    if (run / "run.json").exists() and not marked(run):
        raise ValueError(f"{str(run)!r} holds another run; give another folder")
    run.mkdir(parents=True, exist_ok=True)
    if marked(run):
        clear(run)
    mark(run)
    first = found.folders[found.first]
    _write_recipe(run, first)
    _write_records(run, found)
    peers = _write_checkpoint(run, found)
    description = dict(read_description(first) or {})
    (run / "run.json").write_text(json.dumps(description, indent=1))
    return max(found.lines), peers


def _write_recipe(run: Path, first: Path) -> None:
    text = (first / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"(?m)^output:.*$", f"output: {json.dumps(str(run))}", text))


def _write_records(run: Path, found: History) -> None:
    _write_lines(run / records_of(0), found.lines.values())
    for process, lines in found.records.items():
        if process != found.first:
            there = [of_peers(line) for t, line in lines.items()
                     if t in found.lines and set(line["hosted"]) <= set(found.lines[t]["alive"])]
            _write_lines(run / records_of(process or found.first), there)


def _write_lines(path: Path, lines: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_checkpoint(run: Path, found: History) -> list[int]:
    """The newest checkpoint of the first process, with what the others that were there have of it; its peers."""
    published = complete(found.folders[found.first])
    if not published:
        return []
    rounds = rounds_of(published[-1])
    alive = set(found.lines.get(rounds, {"alive": []})["alive"])
    target = folder_of(run, rounds)
    draft = target.with_name(f".{target.name}.draft")
    digests, peers, parts = {}, [], {}
    for process, folder in found.folders.items():
        source = folder_of(folder, rounds)
        if (source / manifest.NAME).is_file() and set(_hosted(source)) <= alive:
            manifest.verify(source)
            parts[process] = source
    for process, source in parts.items():
        for name in manifest.read(source).digests:
            if name.startswith("consensus/") and process != found.first:
                continue
            into = f"state-{process}.safetensors" if name == "state-0.safetensors" else name
            (draft / into).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, draft / into)
            digests[into] = digest_of_file(draft / into)
        peers += _hosted(source)
    told = manifest.read(parts[found.first])
    absent = [peer for peer in range(told.peers) if peer not in peers]
    (draft / manifest.NAME).write_text(Manifest(rounds, told.peers, told.contents, dict(sorted(digests.items())), absent).text())
    draft.rename(target)
    return sorted(peers)


def _hosted(checkpoint: Path) -> list[int]:
    told = manifest.read(checkpoint)
    return [peer for peer in range(told.peers) if peer not in told.absent]
