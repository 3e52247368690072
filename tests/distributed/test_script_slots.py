"""What fills a slot does in a script what it does in a simulation: the same rounds of the same steps, three peers, four mixes."""

import itertools

import own_loop
import pytest
import torch
from processes import run_processes

import dfl
import topologies
from dfl.methods import SLOTS, Choice

NUM, ROUNDS, LR = 3, 4, 0.1
# a setting of everything that fills a slot
SETTINGS = {
    "schedule": ["alone", {"name": "alternate", "T": 1}, "automatic", "both", "frozen_a", "random_slots", "share_a",
                 {"name": "stragglers", "share": 0.5}],
    "trigger": ["always", {"name": "efhc", "r": 0.3, "bandwidth": [1.0, 2.0, 1.0]}, {"name": "event", "threshold": 0.1},
                {"name": "eventgrad", "initial": 1, "horizon": 0.9}, "global_threshold", {"name": "late", "share": 0.5},
                {"name": "periodic", "every": 2}, {"name": "random_gossip", "probability": 0.5},
                {"name": "sparq", "c": 0.1, "growth": 0.5}, "zero_threshold"],
    "codec": ["bfloat16", "float16", "int4", "int8", "low_rank", "none", "qsgd", {"name": "random_k", "share": 0.3}, "sign",
              {"name": "top_k", "share": 0.3}],
    "channel": ["attack", "bursts", {"name": "delay", "by": 1}, {"name": "lossy", "rate": 0.3}, "masked",
                {"name": "noise", "sigma": 0.1}, {"name": "over_the_air", "snr": 10.0}, "perfect",
                {"name": "segments", "rate": 0.3, "count": 3}, {"name": "zip_noise", "sigma": 0.1}],
    "guard": ["bridge", "clipped", "finite", "geometric_median", "krum", "median", "norm", "trimmed_mean"],
    "wrapper": ["adaptive_consensus", "d2", "exact_diffusion", "flexatc", "gradient_tracking", "led", "momentum_tracking",
                {"name": "muffliato", "sigma": 0.1}, "none", "outer", "proxskip", "push_diging", "push_sum", "quasi_global", "relay",
                "updates"],
    "network": ["links", "none", {"name": "trace", "path": "TRACE"}],
}
# a factor of each peer's own needs another adapter than a script's model has
NOT_IN_A_SCRIPT = {"schedule": {"own_a"}}


def choice(given) -> Choice:
    given = {"name": given} if isinstance(given, str) else dict(given)
    return Choice(given.pop("name"), given)


def cases(trace: str, slot: str) -> list[tuple[dict, str, int]]:
    """Words, graph and steps of a round. A simulation undoes at the end of a round what a mask leaves out, a script in every step."""
    found = []
    for one in SETTINGS[slot]:
        one = one | {"path": trace} if choice(one).name == "trace" else one
        found.append(({"guard": "finite", slot: one}, "path" if one == "relay" else "complete", 1 if slot == "schedule" else 2))
    return found


def model():
    return own_loop.model(lora_alpha=2)  # scaled by 1, as factors of a simulation are


def pairs(net) -> dict[str, tuple]:
    """A and B of each layer."""
    layers = {name: getattr(net.base_model.model, name) for name in ("first", "second")}
    return {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in layers.items()}


def in_a_script(rank: int, trace: str, slot: str) -> list[list[float]]:
    found = []
    for words, graph, every in cases(trace, slot):
        net = model()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR)
        with dfl.Gossip(net, optimizer, every, rounds=ROUNDS, method="lora", topology=graph, **words):
            for number in range(ROUNDS * every):
                own_loop.step(net, optimizer, rank, number)
        found.append(torch.cat([part.detach().flatten() for pair in pairs(net).values() for part in pair]).tolist())
    return found


def simulated(words: dict, graph: str, every: int) -> torch.Tensor:
    """The factors of all peers (NUM, D) after the same steps, which are taken on a model of their own."""
    net = model()
    start = {name: tuple(part.detach().clone().expand(NUM, -1, -1) for part in pair) for name, pair in pairs(net).items()}
    every_factor = [(name, k, part) for name, pair in pairs(net).items() for k, part in enumerate(pair)]

    def local_step(factors, t, trains, after_step=None):
        for number in range(t * every, (t + 1) * every):
            for peer in range(NUM):
                for name, k, part in every_factor:
                    part.data.copy_(factors[name][k][peer])
                    part.requires_grad_("AB"[k] in trains)
                own_loop.step(net, torch.optim.SGD([part for *_, part in every_factor], lr=LR), peer, number)
                for name, k, part in every_factor:
                    factors[name][k][peer] = part.detach()
            if after_step is not None:
                after_step()

    slots = {slot: choice(given) for slot, given in words.items()}
    found = dfl.simulate("lora", topologies.build(graph, NUM), start, local_step, ROUNDS, measure_every=0, lr=LR, local_steps=every,
                         **slots)
    return torch.cat([part.flatten(1) for pair in found.factors.values() for part in pair], 1)


@pytest.mark.parametrize("slot", SETTINGS)
def test_what_fills_a_slot_does_in_a_script_what_it_does_in_a_simulation(slot, tmp_path):
    assert {choice(one).name for one in SETTINGS[slot]} | NOT_IN_A_SCRIPT.get(slot, set()) == set(SLOTS[slot])
    trace = tmp_path / "trace.csv"
    links = [f"0,{i},{j},1000.0,0.1" for i, j in itertools.permutations(range(NUM), 2)]
    trace.write_text("\n".join(["round,sender,receiver,bandwidth,latency", *links]) + "\n")
    told = run_processes(in_a_script, NUM, str(trace), slot, timeout=150)
    for (words, graph, every), *rows in zip(cases(str(trace), slot), *told, strict=True):
        torch.testing.assert_close(torch.tensor(rows), simulated(words, graph, every), rtol=0, atol=1e-6, msg=lambda text, w=words:
                                   f"{w}: {text}")
