"""Rules that aggregate LoRA on synthetic factors: what one mix and sixty idle rounds cost the product, beside the derived figures.

    python benchmarks/aggregation.py [--seeds 10]

Four tables: one mix on a complete graph; consensus on a ring without training; sketches by size; peers of unequal ranks. The figures
beside ours come from one seed (one mix, sketches) or three (ring), so a few per cent are noise.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from stamp import write
from torch import Tensor

import topologies
from dfl import simulate

Pairs = tuple[Tensor, Tensor]  # A (N, R, I), B (N, O, R)
RING_RULES = {"lora": ("lora", {}), "flora_na": ("flora_na", {}), "fedrot": ("fedrot", {}), "decaf": ("decaf", {}),
              "fedask s=nr": ("fedask", {"s": 32, "l": 36, "memory": True})}
ONE_MIX_RULES = {"lora": ("lora", {}), "flora_na": ("flora_na", {}), "lora_fair ridge=0": ("lora_fair", {"ridge": 0.0}),
                 "fedrot": ("fedrot", {}), "flora_na aligned": ("flora_na", {"align": "own"}), "decaf": ("decaf", {}),
                 "fedrot alternate": ("fedrot", {"criterion": "alternate"}), "fedrot joint": ("fedrot", {"criterion": "joint"}),
                 "flora_na global": ("flora_na", {"scope": "global"}),
                 "flora_na delta": ("flora_na", {"form": "delta"}),
                 "flora_na delta adamw": ("flora_na", {"form": "delta", "scope": "global", "solver": "adamw"})}
ONE_MIX = {"common start": (.0714, .0711, .0687, .0699, .0697, .0664), "independent": (.887, .838, .859, .842, .819, .698),
           "rotated copies": (.734, .121, .112, .0041, .0041, .0038)}
RING = {"common start": (.0663, .0655, .0648, .0589, .0587), "independent": (.942, .913, .881, .783, .726),
        "rotated copies": (.779, .286, .0033, .0030, .0030)}
SKETCHES = {"s=2r l=4r": ("fedask", {"s": 8, "l": 16}, .126), "s=4r l=8r": ("fedask", {"s": 16, "l": 32}, .076),
            "s=nr": ("fedask", {"s": 32, "l": 40}, .0626), "best": ("decaf", {}, .0626)}
UNEQUAL_RANKS = (2, 2, 4, 4, 8, 8, 8, 8)
UNEQUAL_RULES = {"decaf": {}, "hetlora": {}, "replicate": {}, "fedask": {"memory": True}, "carry": {}, "fedhl": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"one mix, complete graph of 5 (64 x 48, rank 4)": one_mix(args.seeds),
               "60 idle rounds, ring of 8 (48 x 36, rank 4)": ring(args.seeds),
               "sketches, one mix, complete graph of 8 (64 x 48, rank 4)": sketches(args.seeds),
               "unequal ranks, 60 idle rounds, ring of 8": unequal(args.seeds)}
    write("aggregation", {"seeds": args.seeds, "threads": 1, "error": "relative Frobenius error of the product", "figure": "mean over "
                          "seeds, standard deviation over seeds, derived figure (null: there is none)"}, results)


def one_mix(seeds: int) -> dict:
    """Mean over the receivers of ||ΔW_i - mean ΔW|| / ||mean ΔW|| after one mix."""
    table = {}
    for start, published in ONE_MIX.items():
        figures = dict(zip(list(ONE_MIX_RULES)[:5] + ["best rank 4"], published, strict=True))
        runs = {name: [] for name in ["best rank 4", *ONE_MIX_RULES]}
        for seed in range(seeds):
            pairs = STARTS[start](seed, 5, 64, 48, 4)
            target = (pairs[1] @ pairs[0]).mean(0)
            runs["best rank 4"].append(float(torch.linalg.svdvals(target)[4:].norm() / target.norm()))
            for name, (rule, params) in ONE_MIX_RULES.items():
                a, b = mixed(rule, "complete", pairs, 1, **params)
                runs[name].append(float((b @ a - target).norm(dim=(1, 2)).mean() / target.norm()))
        table[start] = rows(f"one mix, {start}", runs, figures)
    return table


def ring(seeds: int) -> dict:
    """||mean ΔW' - mean ΔW|| / ||mean ΔW|| after sixty idle rounds, and what disagreement is left."""
    table = {}
    for start, published in RING.items():
        figures = dict(zip([*list(RING_RULES)[:4], "best rank 4"], published, strict=True))
        runs = {name: [] for name in ["best rank 4", *RING_RULES]}
        spread = {name: [] for name in RING_RULES}
        for seed in range(seeds):
            pairs = STARTS[start](seed, 8, 48, 36, 4)
            target = (pairs[1] @ pairs[0]).mean(0)
            runs["best rank 4"].append(float(torch.linalg.svdvals(target)[4:].norm() / target.norm()))
            for name, (rule, params) in RING_RULES.items():
                a, b = mixed(rule, "ring", pairs, 60, **params)
                mean = (b @ a).mean(0)
                runs[name].append(float((mean - target).norm() / target.norm()))
                spread[name].append(float((b @ a - mean).norm(dim=(1, 2)).mean() / mean.norm()))
        table[start] = rows(f"ring, {start}", runs, figures)
        table[f"{start}, spread left"] = rows(f"ring, {start}, spread left", spread, {})
    return table


def sketches(seeds: int) -> dict:
    runs = {name: [] for name in SKETCHES}
    for seed in range(seeds):
        pairs = STARTS["common start"](seed, 8, 64, 48, 4)
        target = (pairs[1] @ pairs[0]).mean(0)
        for name, (rule, params, _) in SKETCHES.items():
            a, b = mixed(rule, "complete", pairs, 1, **params)
            runs[name].append(float((b[0] @ a[0] - target).norm() / target.norm()))
    return rows("sketches", runs, {name: figure for name, (_, _, figure) in SKETCHES.items()})


def unequal(seeds: int) -> dict:
    """The share of the mean product's energy in its two leading directions, before and after; residuals are not counted."""
    runs = {"at the start": [], **{rule: [] for rule in UNEQUAL_RULES}}
    for seed in range(seeds):
        pairs = truncated_peers(seed)
        runs["at the start"].append(share(pairs))
        for rule, params in UNEQUAL_RULES.items():
            runs[rule].append(share(mixed(rule, "ring", pairs, 60, ranks=UNEQUAL_RANKS, **params)))
    return rows("energy in the two leading directions", runs, {"at the start": .755, "decaf": .9999})


def mixed(rule: str, topology: str, pairs: Pairs, rounds: int, **params) -> Pairs:
    """The factors after `rounds` rounds without training."""
    graph = topologies.build(topology, len(pairs[0]))
    return simulate(rule, graph, {"layer": pairs}, lambda factors, t, trains: None, rounds, measure_every=0, **params).factors["layer"]


def rows(title: str, runs: dict[str, list[float]], figures: dict[str, float]) -> dict:
    print(f"\n{title:<44}  ours (sd)          derived")
    table = {}
    for name, values in runs.items():
        mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        figure = figures.get(name)
        print(f"  {name:<42}  {mean:<8.4g} ({deviation:.1g})   {'' if figure is None else figure}", flush=True)
        table[name] = {"mean": mean, "sd": deviation, "derived": figure}
    return table


def common_start(seed: int, num: int, out: int, inp: int, rank: int) -> Pairs:
    """One A, moved by a fifth of its size; B half common, half private."""
    draw = normal(seed)
    a = draw(1, rank, inp) / inp ** 0.5 + 0.2 * draw(num, rank, inp) / inp ** 0.5
    return a, 0.3 * draw(1, out, rank) + 0.3 * draw(num, out, rank)


def independent(seed: int, num: int, out: int, inp: int, rank: int) -> Pairs:
    draw = normal(seed)
    return draw(num, rank, inp), draw(num, out, rank)


def rotated_copies(seed: int, num: int, out: int, inp: int, rank: int) -> Pairs:
    """One pair with a tenth of noise, turned by a random orthogonal matrix of each peer's own."""
    draw = normal(seed)
    a, b = draw(1, rank, inp), draw(1, out, rank)
    a, b = a + 0.1 * draw(num, rank, inp), b + 0.1 * draw(num, out, rank)
    turn = torch.linalg.qr(draw(num, rank, rank)).Q
    return turn.mT @ a, b @ turn


STARTS: dict[str, Callable[..., Pairs]] = {"common start": common_start, "independent": independent, "rotated copies": rotated_copies}


def truncated_peers(seed: int, size: int = 40) -> Pairs:
    """A matrix with singular values 0.8^t and 2 % noise, cut to each peer's rank."""
    draw = normal(seed)
    u, v = (torch.linalg.qr(draw(size, 8)).Q for _ in range(2))
    clean = (u * 0.8 ** torch.arange(8)) @ v.T
    a, b = torch.zeros(8, 8, size, dtype=torch.float64), torch.zeros(8, size, 8, dtype=torch.float64)
    for peer, rank in enumerate(UNEQUAL_RANKS):
        noise = draw(size, size)
        left, s, right = torch.linalg.svd(clean + 0.02 * clean.norm() * noise / noise.norm())
        a[peer, :rank], b[peer, :, :rank] = s[:rank, None].sqrt() * right[:rank], left[:, :rank] * s[:rank].sqrt()
    return a, b


def share(pairs: Pairs) -> float:
    energy = torch.linalg.svdvals((pairs[1] @ pairs[0]).mean(0)).square()
    return float(energy[:2].sum() / energy.sum())


def normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


if __name__ == "__main__":
    main()
