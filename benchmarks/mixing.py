"""What mixing costs: the low-rank kernel against a dense SVD, and every rule's mix on the shapes of real models.

    python benchmarks/mixing.py kernel [--size 4096] [--rank 16] [--neighbors 8]
    python benchmarks/mixing.py rules [--model roberta-large] [--ranks 8 16 32] [--device cuda] [--budget 20]

`rules`: one peer of a ring mixes three messages (its own and two neighbours'), float32, query and value of every layer; seconds of
send and mix, best of several, as multiples of `lora` in the same run, and bytes of one message beside the closed form. A rule that
would take longer than `--budget` seconds is measured on the first layers and scaled up, and says so.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from stamp import write
from torch import Tensor

import topologies
from dfl import methods
from dfl.adapters.cores import core_layout
from dfl.adapters.frames import make_frames
from dfl.adapters.kinds import KINDS
from dfl.adapters.layout import a_view, b_view, empty_rows, head_view, make_layout
from dfl.adapters.lowrank import truncate, weighted_sum
from dfl.config import LoraConfig
from dfl.methods import Context
from dfl.slots import Message, Round, Rule, State

# layers, and (d_in, d_out) of query and value
MODELS = {"roberta-large": (24, ((1024, 1024), (1024, 1024))), "llama-3-8b": (32, ((4096, 4096), (4096, 1024)))}
PARAMS = {"tad": {"T": 1}}
HEADS = 4


def kernel(size: int, rank: int, neighbors: int, device: torch.device) -> dict:
    """The best rank-R part of a weighted sum of products: compact against dense, the same numbers."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(neighbors, rank, size, generator=generator).to(device) / size ** 0.5
    b = torch.randn(neighbors, size, rank, generator=generator).to(device)
    weights = torch.full((neighbors,), 1 / neighbors, dtype=torch.float64, device=device)
    compact_s, compact = best(lambda: truncate(*weighted_sum(weights, a, b), rank), device, repeats=5)
    dense_s, (u, s, vh) = best(lambda: torch.linalg.svd(torch.einsum("j,jor,jri->oi", weights.float(), b, a), full_matrices=False),
                               device, repeats=1)
    dense = (u[:, :rank] * s[:rank]) @ vh[:rank]
    difference = float(((compact.u * compact.s) @ compact.vh - dense).norm() / dense.norm())
    # what the two thin QRs and the core's SVD must at least do, at the speed of a matrix product of the same factors
    flops = 4 * 2 * size * (neighbors * rank) ** 2 + 20 * (neighbors * rank) ** 3
    left, right = weighted_sum(weights, a, b)
    product_s, _ = best(lambda: (left.mT @ left, right @ right.mT), device, repeats=5)
    peak = 2 * 2 * size * (neighbors * rank) ** 2 / product_s
    return {"size": size, "rank": rank, "neighbors": neighbors, "compact_s": compact_s, "dense_s": dense_s,
            "ratio": dense_s / compact_s, "relative_difference": difference, "flops": flops, "limit_s": flops / peak,
            "times_the_limit": compact_s / (flops / peak)}


def best(function: Callable, device: torch.device, repeats: int):
    """Seconds of the fastest of `repeats` calls, and what the last returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def make(name: str, model: str, rank: int, layers: int, device: torch.device) -> Context:
    """The layout of a peer's row for a method on the first `layers` layers of a model, and what else its rule wants."""
    shapes = MODELS[model][1]
    pairs = [(f"{k}.{'qv'[m]}", rank, i, o, 1.0) for k in range(layers) for m, (i, o) in enumerate(shapes)]
    adapter = methods.METHODS[name].adapter
    kind = KINDS[name_of_kind(name)]
    layout = make_layout(pairs, magnitudes=[(p[0], kind.beside.shape(*p[2:4])) for p in pairs] if kind.beside else ())
    if kind.core:
        layout = core_layout(layout, (), kind.core(LoraConfig(heads=HEADS)))
    elif kind.own_a:
        return Context(layout, peers=3, frames=make_frames(layout, 0, 3))
    elif adapter:
        frozen = [(torch.randn(o, i) / i ** 0.5).to(device) for i, o in shapes]  # one weight of each shape stands for all layers
        return Context(layout, weights={p[0]: frozen[index % len(shapes)] for index, p in enumerate(pairs)})
    return Context(layout)


def name_of_kind(method: str) -> str:
    """The adapters that a method mixes."""
    return next((name for name, kind in KINDS.items() if kind.methods and method == kind.methods[0]),
                methods.METHODS[method].adapter or "lora")


def rows(context: Context, device: torch.device) -> Tensor:
    """Three peers that started together and drifted, A the same where a rule wants it, or each peer's own."""
    generator, layout = torch.Generator().manual_seed(0), context.layout
    x = empty_rows(3, layout.size, device=device)
    for pair in layout.pairs:
        a_view(x, pair).copy_((torch.randn(pair.rank, pair.d_in, generator=generator) / pair.d_in ** 0.5).expand(3, -1, -1))
        b_view(x, pair).copy_(0.1 * torch.randn(3, pair.d_out, pair.rank, generator=generator))
    for tensor in (*layout.magnitudes, *layout.cores):
        head_view(x, tensor).copy_(1 + 0.1 * torch.randn(3, *tensor.shape, generator=generator))
    for peer, row in enumerate(x if context.frames else ()):
        row[layout.groups["A"]] = context.frames(peer)[layout.groups["A"]].to(device)
    return x


class Peer(NamedTuple):
    """One of three peers of a ring in the first round: its rule and row, and what it sends."""

    rule: Rule
    x: Tensor
    round: Round
    state: State
    message: Message


def peers_of(name: str, model: str, rank: int, layers: int, device: torch.device, num: int = 3) -> list[Peer]:
    """The first `num` of the three."""
    context = make(name, model, rank, layers, device)
    method = methods.build(name, context, PARAMS.get(name, {}))
    weights, found = {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}, []
    for peer, row in enumerate(rows(context, device)[:num]):
        round = Round(0, peer, weights, method.schedule.plan(0, peer))
        message, state = method.rule.send(row, method.rule.init(row), round)
        # a part may be a view of the row; what is received lies elsewhere
        apart = message._replace(parts={key: part.clone() for key, part in message.parts.items()})
        found.append(Peer(method.rule, row, round, state, apart))
    return found


def bytes_of(message: Message) -> int:
    return sum(value.nbytes for value in (*message.parts.values(), *message.meta.values()))


def mix_seconds(name: str, model: str, rank: int, layers: int, device: torch.device, repeats: int) -> tuple[float, int]:
    """Seconds of one peer's send and mix, and the bytes of its message."""
    peers = peers_of(name, model, rank, layers, device)
    (rule, x, round, state, message), inbox = peers[0], {number: peer.message for number, peer in enumerate(peers)}

    def once():
        rule.send(x, state, round)
        return rule.mix(x, inbox, state, round)

    once()
    return best(once, device, repeats)[0], bytes_of(message)


def closed_form(name: str, model: str, rank: int) -> int:
    """Bytes of one float32 message to one neighbour, from the papers' formulas."""
    layers, shapes = MODELS[model]
    ins, outs = (sum(s[k] for s in shapes) * layers for k in (0, 1))
    count = layers * len(shapes)
    numbers = {"ffa": rank * outs, "fed_svd": rank * outs, "rolora": rank * outs, "share_a": rank * ins, "local": 0,
               "fed_sb": count * rank ** 2, "ravan": count * (HEADS * (rank // HEADS) ** 2 + HEADS),
               "fedask": 2 * rank * outs + 4 * rank * ins,  # sketches of width 2 R and 4 R
               "task_bank": rank * outs // 2 + rank * outs // 32,  # half of B, and a bit for each of its numbers
               "plora": rank // 2 * (ins + outs), "dora": rank * (ins + outs) + outs}.get(name, rank * (ins + outs))
    return 4 * numbers


def all_rules(model: str, rank: int, device: torch.device, budget: float) -> dict:
    layers, table = MODELS[model][0], {}
    plain, _ = mix_seconds("lora", model, rank, layers, device, repeats=5)
    for name in methods.METHODS:
        if name == "local":
            continue
        some, _ = mix_seconds(name, model, rank, 2, device, repeats=1)
        measured = layers if some * layers / 2 < budget else 2
        seconds, sent = (some, 0) if measured == 2 else mix_seconds(name, model, rank, layers, device, repeats=3)
        if measured != layers:
            sent = bytes_of(peers_of(name, model, rank, layers, device, num=1)[0].message)
        seconds *= layers / measured
        expected = closed_form(name, model, rank)
        table[name] = {"seconds": seconds, "times_lora": seconds / plain, "layers_measured": measured, "message_bytes": sent,
                       "closed_form_bytes": expected}
        part = "" if measured == layers else f"  ({measured} layers)"
        print(f"{model:14} r={rank:<3} {name:12} {seconds * 1e3:10.1f} ms {seconds / plain:8.1f} x lora  {sent / 1e6:8.2f} MB  "
              f"closed form {expected / 1e6:8.2f} MB{part}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernel", "rules"))
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--neighbors", type=int, default=8)
    parser.add_argument("--model", choices=tuple(MODELS), nargs="*", default=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=20.0)
    args = parser.parse_args()
    device = torch.device(args.device)
    assert np.allclose(topologies.build("ring", 8).matrix(0)[0, [0, 1, 7]], 1 / 3)  # what `mix_seconds` mixes with
    if args.what == "kernel":
        result = kernel(args.size, args.rank, args.neighbors, device)
        print("  ".join(f"{key} {value:.4g}" for key, value in result.items()))
    else:
        result = {model: {rank: all_rules(model, rank, device, args.budget) for rank in args.ranks} for model in args.model}
    write(f"mixing_{args.what}_{device.type}", vars(args), result)


if __name__ == "__main__":
    main()
