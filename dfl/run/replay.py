"""`dfl replay`: a run that went on without some of its processes once more, in one process, from the record of who was there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfl.config import Config, from_dict
from dfl.engine.living import Living, forget
from dfl.engine.state import Tree, of_peers
from dfl.run.build import assemble, check, load
from dfl.run.checkpoint import read_state
from dfl.run.loop import Hooks, Run, run_rounds
from dfl.run.runtime import Place, Runtime, num_threads
from dfl.run.survive import begin_at, mean_of
from dfl.store.checkpoints import latest
from dfl.store.collect import History, history
from dfl.store.manifest import read
from dfl.store.runs import read_config
from dfl.transport import InProcess


class Same(NamedTuple):
    """rounds: how many were run; losses: rounds whose recorded losses are the same bits; peers: those that were there at the end;
    equal: those among them whose rows in their last checkpoint are the same bits."""

    rounds: int
    losses: int
    peers: list[int]
    equal: list[int]

    @property
    def all(self) -> bool:
        return self.losses == self.rounds and self.equal == self.peers


def replay(output: Path) -> Same:
    """Run what the processes in RUN/process-K have recorded, and compare. ValueError where there is no such record."""
    found = history(output)
    tree = read_config(found.folders[found.first]).to_dict()
    quiet = {"membership": "fixed", "processes": 1, "device": "cpu", "report_to": [], "measure": {"every": 0, "layers": 0}}
    config = from_dict(tree | quiet | {"eval": tree["eval"] | {"every": 0}})
    topology = Living(check(config))
    torch.set_num_threads(num_threads(config))
    runtime = Runtime(Place(), torch.device("cpu"), InProcess(), range(config.peers))
    run = assemble(config, runtime, load(config, runtime.device), topology)
    again = _Again(run, topology, found)
    again.begin(0)
    # to the last round that is recorded, also where the run has not ended
    run_rounds(run, Hooks(again.record, lambda: None, lambda: run.completed + 2 not in found.lines))
    return again.compared(config)


class _Again:
    """What happened between the rounds: who went, who came, and with what."""

    def __init__(self, run: Run, living: Living, found: History):
        self.run, self.living, self.found, self.same = run, living, found, 0
        wanted = [way["of"] for line in found.lines.values() for way in line.get("came", {}).values() if way["from"] == "checkpoint"]
        self._wanted = set(wanted)
        self._kept: dict[int, tuple[Any, Tree]] = {}

    def record(self, line: dict[str, Any]) -> None:
        """The end of a round; line["round"] have been run."""
        t = line["round"]
        if t:
            told, losses = self.found.losses(t), line["train_loss_peers"]
            # who went at the end of the round may not have recorded it any more
            self.same += bool(told) and all(losses[peer] == loss for peer, loss in told.items())
        if t in self._wanted:
            self._kept[t] = self.run.peers.snapshot(), {"rule": dict(self.run.gossip.state["rule"])}
        if t and t + 1 in self.found.lines:
            self.begin(t)

    def begin(self, t: int) -> None:
        line = self.found.lines.get(t + 1)
        if line is None:
            raise ValueError(f"round {t + 1} is in no record of {', '.join(map(str, self.found.folders.values()))}")
        if tuple(line["alive"]) != self.living.alive(t):
            self.living.change(t, line["alive"])
            self.run.gossip.graph_changed()
        came = {int(peer): way for peer, way in line.get("came", {}).items()}
        if came:
            self.run.gossip.state = forget(self.run.gossip.state, came)
            for peer in _in_order(came):
                self._come(peer, came[peer], t)

    def _come(self, peer: int, way: Mapping[str, Any], t: int) -> None:
        run = self.run
        row = run.peers.ids.index(peer)
        if way["from"] == "neighbours":
            weights = {int(j): weight for j, weight in way["of"].items()}
            begin_at(run, peer, mean_of({j: run.peers.x[run.peers.ids.index(j)] for j in weights}, weights))
            self._moments(peer, {})
        elif way["of"] != t:
            (x, moments), state = self._kept[way["of"]]
            run.peers.x[row] = x[row]
            run.gossip.state["rule"] |= of_peers(state, [peer])["rule"]
            self._moments(peer, moments)

    def _moments(self, peer: int, saved: Mapping[str, torch.Tensor]) -> None:
        """Put a peer's own in place of those that it has."""
        x, moments = self.run.peers.snapshot()
        kept = {name: value for name, value in moments.items() if name.partition(".")[0] != str(peer)}
        own = {name: value for name, value in saved.items() if name.partition(".")[0] == str(peer)}
        self.run.peers.restore((x, kept | own))

    def compared(self, config: Config) -> Same:
        peers = self.found.lines[self.run.completed]["alive"]
        equal = [peer for peer in peers if self._is_equal(peer)]
        return Same(self.run.completed, self.same, list(peers), equal)

    def _is_equal(self, peer: int) -> bool:
        folder = latest(self.found.folder_of_peer(peer))
        if folder is None or read(folder).rounds != self.run.completed:
            return False
        return torch.equal(read_state(folder, [peer])[f"x.{peer}"], self.run.peers.x[self.run.peers.ids.index(peer)].cpu())


def _in_order(came: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """By their turns in the round: who took a row of another that came in the same round did so after that one came, or, of one that
    was lost again, before. Those of one turn took none of each other."""
    return sorted(came, key=lambda peer: (came[peer]["turn"], peer))
