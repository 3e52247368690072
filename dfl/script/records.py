"""What a script's run leaves in its folder: the files of any run, so that `dfl report`, `dfl watch` and `dfl export` read it too.

    OUTPUT/recipe.yaml, run.json, metrics.jsonl, metrics-K.jsonl, checkpoints/round-00012/peer-K, consensus
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from dfl.adapters.attach import Adapted
from dfl.config import from_dict
from dfl.run.checkpoint import Checkpointer
from dfl.run.description import describe_run
from dfl.run.folder import check_continuation, check_shared, make_room, refuse, write_whole
from dfl.run.loop import Run, rejections, round_record
from dfl.script.adapters import Found
from dfl.script.joining import Peer
from dfl.store.directory import ENDED, all_records, marked, marker_id, records_of
from dfl.store.jsonlines import rewind
from dfl.store.lease import Lease, hold
from dfl.store.records import JsonLines, finite, of_peers
from dfl.store.runs import read_description
from dfl.transport.agreement import together


class Records:
    """The folder of a script's run, which all peers open together; without a folder every call does nothing.

    resumed: it goes on with the run that lies there. ValueError on all peers for a folder that holds another run, or anything else
    of the names that a run writes.
    """

    def __init__(self, run: Run, peer: Peer, found: Found, facts: Mapping[str, Any], output: str | None, *, resumed: bool):
        self.peer, self.folder, self.run_id = peer, Path(output) if output else None, ""
        self.lines: JsonLines | None = None
        self.lease: Lease | None = None
        if self.folder is None:
            return
        self.config = run.config
        new = not (resumed and together(peer.outside, lambda: marked(self.folder)))
        self.lease = self._claim(resumed and not new)
        together(peer.outside, lambda: make_room(self.folder, new, peer.overwrite, self.lease) if peer.rank == 0 else None)
        together(peer.outside, lambda: self._describe(run, found, facts, new) if peer.rank == 0 else None)
        check_shared(self.folder, peer.outside, new, self.lease)
        self.run_id = marker_id(self.folder)
        self.lines = JsonLines(self.folder / records_of(peer.rank), guard=self.lease.check)

    def _claim(self, resumed: bool) -> Lease:
        """The right to write there."""
        peer, first = self.peer, self.peer.rank == 0
        config = from_dict(self.config.to_dict() | {"output": str(self.folder)})
        together(peer.outside, lambda: refuse(config, self.folder, resumed, peer.overwrite) if first else None)
        lease = hold(self.folder, peer.outside)
        try:
            together(peer.outside, lambda: check_continuation(config, self.folder) if first and resumed else None)
        except BaseException:
            if first:
                lease.release()
            raise
        return lease

    def _describe(self, run: Run, found: Found, facts: Mapping[str, Any], new: bool) -> None:
        """What process 0 leaves before the first round; of rounds that are run again, nothing stays."""
        write_whole(self.folder / "recipe.yaml", yaml.safe_dump(run.config.to_dict() | {"output": str(self.folder)}, sort_keys=False),
                    self.lease)
        model = getattr(found.model, "config", None)
        labels = getattr(model, "id2label", None) if run.config.model.task.name == "sequence_classification" else None
        known = {"base": run.config.model.name, "primary": "loss", "better": {"loss": "lower", "perplexity": "lower"},
                 "label_names": [labels[key] for key in sorted(labels)] if labels else [], "method": run.gossip.method.facts,
                 "state_length": run.peers.layout.size, "own": "the examples are the script's", "processes": self.peer.size,
                 "device": str(run.peers.device), "contents": {}, "script": Path(sys.argv[0]).name or "a notebook"}
        about = describe_run(run.config.to_dict(), known | dict(facts), None if new else read_description(self.folder))
        write_whole(self.folder / "run.json", json.dumps(about, indent=1, default=str), self.lease)
        for path in [] if new else all_records(self.folder):
            self.lease.check()
            rewind(path, run.completed - (run.pending is not None) + 1)
        (self.folder / ENDED).unlink(missing_ok=True)

    def round(self, run: Run, summed: Tensor, evaluation: dict | None) -> None:
        """The record of the last round, or of the start. summed: as of `round_record`."""
        if run.pending is None:
            if evaluation is not None and run.completed == 0:
                self._write({"round": 0, **self._hosted(), "eval": evaluation})
            return
        if self.folder is None:
            rejections(run, run.completed - 1, run.pending.table)
            run.pending = None
            return
        record = round_record(run, run.completed - 1, run.pending, summed) | run.pending.found
        record["seconds"] |= {"measure": run.pending.measure_seconds, "evaluate": 0.0}
        run.pending = None
        self._write(record | ({} if evaluation is None else {"eval": evaluation}))

    def _hosted(self) -> dict[str, list[int]]:
        return {"hosted": [self.peer.rank]} if self.peer.size > 1 else {}

    def _write(self, record: dict) -> None:
        if self.lines is not None:
            self.lines.write(record if self.peer.rank == 0 else of_peers(record))

    def save(self, run: Run, adapted: Adapted, tensors: Mapping[str, Tensor]) -> None:
        """A checkpoint with every peer and the consensus, as a run's own; all peers together. adapted: with parameters to write by."""
        if self.folder is None:
            return
        saver = Checkpointer(self.folder, self.peer.outside, self.peer.rank, run.config.model.name, run.config.checkpoint.keep,
                             lease=self.lease)
        merged = run.consensus()
        where = saver.save(run.completed, adapted, run.peers.ids, run.peers.x, run.rows(), dict(tensors),
                           (merged, run.consensus_is) if self.peer.rank == 0 else None)
        if self.peer.rank == 0:
            (self.folder / ENDED).write_text(json.dumps({"round": run.completed, "callback": "the script"}))
            print(f"dfl: {self.peer.size} peer(s), {run.completed} rounds: {where}/peer-*, consensus in {where}/consensus; "
                  f"dfl report {self.folder}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()
            self.lines = None
        if self.lease is not None and self.peer.rank == 0:
            self.lease.release()
        self.lease = None


def evaluation_record(found: Mapping[str, float], peer: Peer) -> dict:
    """The metrics that peers have found since the last round, as a record has them. All peers together.

    A peer that has not evaluated has no value; means are over those that have.
    """
    told = [json.loads(data) for data in peer.outside.share(json.dumps(finite(dict(found))).encode())]
    record: dict[str, Any] = {"peers": {}}
    for name in dict.fromkeys(name for one in told for name in one):
        values = [one[name] for one in told if one.get(name) is not None]
        record["peers"][name] = [found.get(name)]
        record[name] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else \
            dict.fromkeys(("mean", "min", "max"))
    return record


def with_perplexity(found: dict[str, float]) -> dict[str, float]:
    """The metrics with the perplexity that a loss comes to; a very large one stays a number that JSON has."""
    return found if "loss" not in found else {**found, "perplexity": found.get("perplexity", math.exp(min(found["loss"], 700.0)))}
