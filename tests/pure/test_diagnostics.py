"""Diagnostics layer by layer against dense numpy."""

import numpy as np
import pytest
import torch
from one_round import build, gossip

import topologies
from dfl.adapters.batched import as_on_a_gpu
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.metrics.layers import diagnose
from dfl.metrics.measures import measure, mixing_errors, seen
from dfl.transport import InProcess

NUM = 6
LAYOUT = make_layout([("q", 2, 7, 5, 1.0), ("v", 2, 7, 5, 1.0), ("o", 2, 4, 9, 2.0)])


def round_of(name, **params):
    x = empty_rows(NUM, LAYOUT.size, dtype=torch.float64)
    x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    rule, out, w = build(name, LAYOUT, **params), x.clone(), topologies.build("ring", NUM).matrix(0)
    states = [rule.init(row) for row in x]
    gossip(rule, out, states, w, 0)
    kept = None if rule.residual is None else torch.stack([s["residual"] for s in states])
    return x, out, w, rule, kept


def diagnosed(before, after, w) -> dict:
    return diagnose(InProcess(), seen(before, after, w, range(NUM), LAYOUT), NUM)


@pytest.mark.parametrize("name", ["lora", "decaf"])
def test_every_diagnostic_is_the_dense_one(name):
    x, out, w, _, _ = round_of(name)
    found = diagnosed(x, out, w)
    links = [(i, j) for i in range(NUM) for j in range(NUM) if i != j and w[i, j]]
    for pair in LAYOUT.pairs:
        a, b = a_view(x, pair).numpy(), b_view(x, pair).numpy()
        new_a, new_b = a_view(out, pair).numpy(), b_view(out, pair).numpy()
        before, after = pair.scaling * b @ a, pair.scaling * new_b @ new_a
        target = np.einsum("ij,jok->iok", w, before)
        norm = lambda m: np.linalg.norm(m, axis=(-2, -1))  # noqa: E731
        spectra = np.linalg.svd(target, compute_uv=False) ** 2
        angles = []
        for i, j in links:
            u, _, vh = np.linalg.svd(a[j] @ a[i].T)
            angles.append(np.degrees(np.arccos(np.clip(np.trace(u @ vh) / 2, -1, 1))))
        expected = {
            "aggregation_error": (norm(target - after) / norm(target)).mean(),
            "tail_energy": (spectra[:, 2:].sum(1) / spectra.sum(1)).mean(),
            "r_weak": np.mean([norm(after[i] - before[j]) for i, j in links]),
            "r_strong": np.mean([norm(new_b[i] - b[j]) ** 2 + norm(new_a[i] - a[j]) ** 2 for i, j in links]),
            "norm_A": norm(new_a).max(), "norm_B": norm(new_b).max(),
            "alignment_angle": np.mean(angles),
        }
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key][pair.name] == pytest.approx(value, rel=1e-9), (key, pair.name)


def test_product_rules_err_by_the_tail_and_residuals_not_at_all():
    x, out, w, _, _ = round_of("decaf")
    found = diagnosed(x, out, w)
    for name, error in found["aggregation_error"].items():
        assert error > 0.1 and found["tail_energy"][name] > 0.01
    x, out, w, rule, kept = round_of("fedhl", residual_rank=9)
    none = torch.zeros_like(kept)
    look = seen(x, out, w, range(NUM), LAYOUT, none, kept, rule.residual)
    for error in diagnose(InProcess(), look, NUM)["aggregation_error"].values():
        assert error < 1e-6
    assert mixing_errors(look).aggregation_error.max() < 1e-6


def test_a_gpu_finds_the_same():
    x, out, w, _, _ = round_of("decaf")
    look = seen(x, out, w, range(NUM), LAYOUT)
    found, measured = diagnosed(x, out, w), measure(InProcess(), look, NUM)
    with as_on_a_gpu():
        assert measure(InProcess(), look, NUM) == pytest.approx(measured, rel=1e-9)
        for name, by_layer in diagnosed(x, out, w).items():
            assert by_layer == pytest.approx(found[name], rel=1e-7), name


def test_peers_that_receive_from_nobody():
    x = round_of("lora")[0]
    found = diagnosed(x, x, np.eye(NUM))
    assert all(np.isfinite(value) for layers in found.values() for value in layers.values())
    assert max(found["aggregation_error"].values()) < 1e-7 and max(found["r_weak"].values()) == 0
