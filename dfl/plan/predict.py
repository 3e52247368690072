"""From a probe and rehearsals to what is said of each combination."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dfl.config import Config, resolve
from dfl.plan import model
from dfl.plan.ask import Ask
from dfl.plan.candidates import Combination
from dfl.plan.probe import PLAIN, gains, probe
from dfl.plan.rehearsal import Rehearsal, rehearse
from dfl.run import build

_HORIZON = 4  # so many times as long as the recipe's run is looked for the target
_NOTHING = 0.01  # disagreement below this share of a round's drift
_OF_RHO = 64  # rounds that rho is the mean of, where W(t) changes


class Seen:
    """What a probe says, as the numbers of `dfl.plan.model`. ValueError for a target that the start has reached."""

    def __init__(self, config: Config, rounds: int, examples: build.Examples, ask: Ask):
        self.ask, self.rounds = ask, rounds
        self.probed = found = probe(config, rounds, examples)
        consensus, peers = gains(found.consensus, found.higher), gains(found.peers, found.higher)
        self.target = gains([ask.target], found.higher)[0]
        if self.target <= peers[0]:
            raise ValueError(f"--target {ask.target} is reached before the first round, {found.metric} {found.peers[0]:.4g}; allowed: "
                             f"{'more' if found.higher else 'less'}")
        best = 0.0 if not found.higher else 1.0 if max(map(abs, [*consensus, *peers])) <= 1 else math.inf
        self.curve = model.fit_curve(found.steps, consensus, best)
        self.foresight = model.foresight(found.steps, consensus, best)
        self.answer = model.response(found.moments)
        self.step_seconds = found.step_seconds if ask.step_seconds is None else ask.step_seconds
        topology: Any = found.run.topology
        told = model.disagreement(_matrix(topology), config.peers, self.answer, rounds, topology.period)
        half = slice(rounds // 2, None)
        total = float(told[half].sum())  # rounding on a complete graph
        self.scale = sum(found.all_distances[half]) / total if total > _NOTHING * found.moments[-1].uu else 1.0
        self.kappa = model.fit_cost(peers[0], consensus, peers, found.distances)

    def reach(self, distances: Any) -> model.Reach:
        """Rounds to the target with this disagreement after each."""
        return model.reach(self.curve, self.kappa, distances, self.probed.local_steps, self.target, self.foresight)

    def facts(self) -> dict[str, Any]:
        one = self.probed
        return {"method": one.run.config.to_dict()["method"], "local_steps": one.local_steps, "rounds": self.rounds,
                "topology": one.run.config.to_dict()["topology"], "metric": one.metric, "better": "higher" if one.higher else "lower",
                "steps": one.steps, "consensus": one.consensus, "peers": one.peers, "disagreement": one.distances,
                "step_seconds_measured": one.step_seconds, "step_seconds": self.step_seconds, "move_rms": one.rms,
                "phi": self.answer.phi, "beta": self.answer.beta, "noise": list(self.answer.noise), "kappa": self.kappa,
                "foresight": self.foresight,
                "measured_over_modelled": self.scale, "weight_that_ends_beyond_the_target": self.curve.reaches(self.target)}


def _matrix(topology: Any) -> Callable[[int], Any]:
    """W(t) as means of what each receives, also where its rows do not sum to one."""
    def matrix(t: int):
        w = topology.matrix(t)
        return w / w.sum(1, keepdims=True)

    return matrix


def predicted(group: list[Combination], seen: Seen, steps: int, refused: Counter[str]) -> Iterator[dict[str, Any]]:
    """What is said of each combination that trains as the probe did. steps: of a whole run of the recipe."""
    plain: dict[str, Plain] = {}
    for one in group:
        config = resolve(one.config.to_dict(), [("network", seen.ask.network(seen.step_seconds))])
        key = json.dumps(one.fields["topology"], sort_keys=True)
        try:
            if key not in plain:
                plain[key] = Plain(config, seen, steps)
            yield _line(one, config, seen, plain[key], steps)
        except ValueError as error:
            refused[str(error)] += 1


class Plain:
    """A topology without codec, trigger, loss and delay. distances: Xi^2 after each round as long as the target is looked for;
    rounds: until the target."""

    def __init__(self, config: Config, seen: Seen, steps: int):
        self.seen, self.config = seen, resolve(config.to_dict(), [*PLAIN.items(), ("network", config.to_dict()["network"])])
        self.topology: Any = build.check(self.config)
        self.matrix, period = _matrix(self.topology), self.topology.period
        horizon = math.ceil(_HORIZON * steps / seen.probed.local_steps)
        self.distances = seen.scale * model.disagreement(self.matrix, config.peers, seen.answer, horizon, period)
        self.rounds = seen.reach(self.distances).rounds
        self._rehearsed: dict[int, Rehearsal] = {}
        self.rho = model.contraction([self.matrix(t) for t in range(min(period or _OF_RHO, _OF_RHO))])

    def rehearsed(self, first: int) -> Rehearsal:
        if first not in self._rehearsed:
            self._rehearsed[first] = rehearse(self.config, self.seen.probed, self.topology, self.seen.answer.phi, first)
        return self._rehearsed[first]

    def with_slots(self, rehearsed: Rehearsal, first: int) -> Any:
        """Xi^2 with what codec, trigger, channel and delay add to it: in proportion, as rehearsals have it with and without them; as
        it is where without them next to nothing is left, as on a complete graph."""
        now, without = rehearsed.distance, self.rehearsed(first).distance
        if without > _NOTHING * self.seen.probed.moments[-1].uu:
            return self.distances * (now / without)
        return self.distances + max(0.0, now - without)


def _line(one: Combination, config: Config, seen: Seen, plain: Plain, steps: int) -> dict[str, Any]:
    local_steps = seen.probed.local_steps
    # a trigger whose threshold falls says something else in the middle of a run than at its begin
    first = 0 if config.trigger.name == "always" or math.isinf(plain.rounds) else int(plain.rounds) // 2
    rehearsed = rehearse(config, seen.probed, plain.topology, seen.answer.phi, first)
    apart = plain.with_slots(rehearsed, first)
    found = seen.reach(apart)
    there = math.isfinite(found.rounds)
    return {"fields": one.fields, "train.rounds": config.train.rounds, "network": config.to_dict()["network"],
            "rounds": found.rounds, "rounds_low": found.low, "rounds_high": found.high,
            "seconds": rehearsed.seconds_until(found.rounds) if there else math.inf,
            "bytes": rehearsed.bytes_until(found.rounds) if there else math.inf,
            "seconds_a_round": rehearsed.seconds, "bytes_a_round": rehearsed.bytes, "share": rehearsed.share, "rho": plain.rho,
            "disagreement": float(apart[-1]), "disagreement_plain": float(plain.distances[-1]),
            "best": found.best if seen.probed.higher else -found.best,
            "notes": _notes(found.rounds * local_steps, seen.curve.seen, steps)}


def _notes(needed: float, seen: float, steps: int) -> list[str]:
    """needed: local steps until the target."""
    if math.isinf(needed):
        return [f"not reached in {_HORIZON} times the recipe's steps"]
    beyond = [f"extrapolated {needed / seen:.1f} times"] if needed > seen else []
    return beyond + (["more steps than the recipe has"] if needed > steps else [])
