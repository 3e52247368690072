"""Guards against one poisoned peer in ten, and codecs by bytes, on the matrix toy.

    python benchmarks/guards_and_codecs.py guards
    python benchmarks/guards_and_codecs.py codecs

The toy: ten peers fit a common matrix of rank 4 and each one of its own of rank 2, under gradient noise. The loss is
the mean over peers of half the squared distance of B A to the mean matrix; under guards over the nine honest peers, to
the mean of theirs. guards: all talk to all, 25 rounds; labels: peer 0 fits its matrix with the other sign, its messages
are its own. codecs: a ring, 60 rounds.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from stamp import write

import topologies
from dfl import simulate
from dfl.methods import Choice

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from toy import PEERS, Toy

SEEDS = range(3)
GUARDS = {"finite": Choice("finite"), "norm": Choice("norm"), "clipped": Choice("clipped"),
          "clipped, factors": Choice("clipped", {"metric": "factors"}), "krum": Choice("krum"),
          "krum, 5": Choice("krum", {"average": 5}), "geometric_median": Choice("geometric_median"),
          "trimmed_mean": Choice("trimmed_mean"), "median": Choice("median"), "bridge": Choice("bridge"),
          "bridge, bulyan": Choice("bridge", {"screen": "bulyan"})}
ATTACKS = {"none": None, "labels": None, "sign_flip": 2.0, "alie": 1.5, "ipm": 3.0, "dissensus": 1.5, "huge": 1e30, "nan": 1.0}
CODECS = {"none": {}, "bfloat16": {}, "int8": {}, "int4": {}, "int4, differences": {"memory": "differences"}, "qsgd": {}, "sign": {},
          "sign, feedback": {"memory": "feedback"}, "top_k": {"share": 0.1}, "top_k, feedback": {"share": 0.1, "memory": "feedback"},
          "random_k": {"share": 0.1}, "low_rank": {}}


def of_the_honest(toy: Toy, factors, honest: slice) -> float:
    a, b = factors["toy"]
    goal = torch.from_numpy(toy.targets[honest].mean(0))
    found = float((b @ a - goal)[honest].square().sum((1, 2)).mean() / 2)
    return found if math.isfinite(found) else math.inf


def under(guard: Choice, attack: str, seed: int) -> float:
    toy, channel = Toy(seed), Choice("perfect")
    if attack == "labels":
        toy.columns[0] *= -1
    elif attack != "none":
        channel = Choice("attack", {"kind": attack, "by": [0], "strength": ATTACKS[attack]})
    graph = topologies.build("complete", PEERS)
    done = simulate("lora", graph, toy.factors(), toy.local_step, 25, guard=guard, channel=channel, measure_every=0)
    return of_the_honest(toy, done.factors, slice(1, None))


def through(name: str, seed: int) -> tuple[float, float]:
    """The loss, and megabytes that a peer has sent."""
    toy, sent = Toy(seed), 0
    done = simulate("lora", topologies.build("ring", PEERS), toy.factors(), toy.local_step, 60,
                    codec=Choice(name.partition(",")[0], CODECS[name]), measure_every=1)
    sent = sum(measured["message_bytes"] for measured in done.measures)
    return of_the_honest(toy, done.factors, slice(None)), sent / PEERS / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("guards", "codecs"))
    what = parser.parse_args().what
    torch.set_num_threads(1)
    about = {"peers": PEERS, "seeds": list(SEEDS)}
    if what == "guards":
        found = {guard: {attack: [_json(under(choice, attack, seed)) for seed in SEEDS] for attack in ATTACKS}
                 for guard, choice in GUARDS.items()}
        write("guards_toy", about | {"strengths": ATTACKS, "topology": "complete", "rounds": 25}, found)
    else:
        found = {name: [dict(zip(("loss", "megabytes"), through(name, seed), strict=True)) for seed in SEEDS] for name in CODECS}
        write("codecs_toy", about | {"parameters": CODECS, "topology": "ring", "rounds": 60}, found)


def _json(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


if __name__ == "__main__":
    main()
