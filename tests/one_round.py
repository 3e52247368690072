"""One round of a method with a given W and given states: what tests of rules ask of the gossip object."""

from typing import NamedTuple

import numpy as np
import torch

from dfl import methods
from dfl.engine.gossip import Gossip, Report
from dfl.methods import Choice, Context, Method
from dfl.simulation import Rows
from dfl.slots import Round
from dfl.transport import InProcess


class Built(NamedTuple):
    """A method for rows of a layout, with what its rule and its schedule promise."""

    method: Method
    layout: object

    def __getattr__(self, name):
        return getattr(self.method.rule, name)

    @property
    def facts(self):
        return self.method.facts

    def plan(self, t: int, peer: int = 0):
        return self.method.schedule.plan(t, peer)

    def trains(self, t: int):
        return self.plan(t).trains

    def sends(self, t: int):
        return self.plan(t).sends

    def masks(self, t: int, peer: int):
        return self.plan(t, peer).mask

    def message(self, x: torch.Tensor, t: int = 0, peer: int = 0):
        """What a peer with a fresh state sends: parts and metadata."""
        return self.send(x, self.init(x), Round(t, peer, {peer: 1.0}, self.plan(t, peer)))[0]

    def length(self, t: int = 0, like: torch.Tensor | None = None) -> int:
        """The numbers of a message of peer 0 in round t."""
        x = torch.randn(self.layout.size, generator=torch.Generator().manual_seed(0)) if like is None else like
        return sum(part.numel() for part in self.message(x, t).parts.values())


class Always:
    """A topology with one W for ever."""

    period = 1

    def __init__(self, w: np.ndarray):
        self.num_peers, self.w = len(w), w

    def matrix(self, t: int, alive=None) -> np.ndarray:
        return self.w


def build(name: str, layout, *, head: str = "frozen", ranks=None, peers=None, rank=None, weights=None, topology=None, rounds=None,
          frames=None, spectra=None, slots=None, params=None, delay=0, **given) -> Built:
    """slots: the choice for some slots, a name or a Choice; params: parameters of the method whose names are taken here."""
    chosen = {slot: Choice(choice) if isinstance(choice, str) else choice for slot, choice in (slots or {}).items()
              } if isinstance(slots, dict) else {}
    given = {**given, **(params or {}), **({} if isinstance(slots, dict) or slots is None else {"slots": slots})}
    context = Context(layout, head, None if ranks is None else tuple(ranks), peers, rank, weights, topology, rounds, frames, spectra)
    return Built(methods.build(name, context, given, chosen, delay), layout)


def gossip(built: Built, x: torch.Tensor, states: list[dict], w: np.ndarray, t: int = 0, *, transport=None, peers=None,
           seed: int = 0, common: bool = False, **rates) -> Report:
    """Exchange and mix round t: rows x (P, D) and `states` of the rule change in place. common: check what all peers share."""
    peers = list(range(len(x)) if peers is None else peers)
    method = built.method
    if not common:  # rows that a run could not start from
        method = method._replace(schedule=method.schedule._replace(common=frozenset()))
    heart = Gossip(method, built.layout, Rows(Always(w)), transport or InProcess(), peers, x, seed=seed)
    heart.state["rule"] = {str(peer): state for peer, state in zip(peers, states, strict=True)}
    report = heart.round(t, x, **rates)
    states[:] = [heart.state["rule"][str(peer)] for peer in peers]
    return report
