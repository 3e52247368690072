"""Differential privacy: the accountant against closed forms and published figures, clipping, noise, runs, refusals."""

import math

import numpy as np
import pytest
import torch
from tiny_runs import assert_goes_on, local_phase, make_config, make_folder, make_run

from dfl.adapters.layout import make_layout
from dfl.config import PrivacyConfig
from dfl.run.build import check
from dfl.training.privacy import epsilon, noisy_mean, sampled, spent

LAYOUT = make_layout([("q", 2, 4, 3, 1.0)], [("head", (2,))])


def gaussian_delta(eps: float, sigma: float) -> float:
    """Of one Gaussian mechanism with sensitivity one (Balle, Wang 2018, arXiv 1805.06530)."""
    def phi(z: float) -> float:
        return (1 + math.erf(z / math.sqrt(2))) / 2
    return phi(1 / (2 * sigma) - eps * sigma) - math.exp(eps) * phi(-1 / (2 * sigma) - eps * sigma)


@pytest.mark.parametrize("sigma, steps", [(1.0, 1), (3.0, 1), (4.0, 9)])
def test_without_sampling_it_is_the_gaussian_mechanism(sigma, steps):
    """T steps are one with sigma / sqrt(T)."""
    found = epsilon(sigma, 1.0, steps, 1e-5)
    assert gaussian_delta(found, sigma / math.sqrt(steps)) == pytest.approx(1e-5, rel=0.02)


def test_a_published_run_costs_no_more_than_its_moments_accountant_said():
    """q = 0.01, sigma = 4, delta = 1e-5, 10,000 steps: 1.26 (Abadi et al. 2016, section 3.2)."""
    found = epsilon(4.0, 0.01, 10_000, 1e-5)
    assert 0.9 < found <= 1.26
    assert found < epsilon(4.0, 0.01, 20_000, 1e-5) and found < epsilon(2.0, 0.01, 10_000, 1e-5)
    assert math.isinf(epsilon(0.0, 0.01, 10, 1e-5))


def test_one_example_moves_the_sum_by_the_clip_at_most():
    g = torch.randn(6, LAYOUT.size, generator=torch.Generator().manual_seed(0)) * 5
    settings = PrivacyConfig(noise=0.0, clip=0.7)
    both, without = (noisy_mean(rows, LAYOUT, {"A", "B", "head"}, settings, 1, 0) for rows in (g, g[1:]))
    assert float((both - without).norm()) == pytest.approx(0.7, rel=1e-5)
    small = g * 1e-3
    torch.testing.assert_close(noisy_mean(small, LAYOUT, {"A", "B", "head"}, settings, 2, 0), small.sum(0) / 2)
    only_b = noisy_mean(g, LAYOUT, {"B"}, PrivacyConfig(noise=1.0), 1, 0)
    assert not only_b[LAYOUT.groups["A"]].any() and only_b[LAYOUT.groups["B"]].all()


def test_noise_is_sigma_times_the_clip_over_the_expected_batch():
    settings = PrivacyConfig(noise=2.0, clip=0.5)
    draws = torch.stack([noisy_mean(torch.zeros(0, LAYOUT.size), LAYOUT, {"A"}, settings, 10, seed) for seed in range(3000)])
    assert float(draws[:, LAYOUT.groups["A"]].std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.02)
    assert torch.equal(noisy_mean(torch.zeros(0, LAYOUT.size), LAYOUT, {"A"}, settings, 10, 3), draws[3])


def test_samples_are_poisson():
    indices = np.arange(100, 150)
    sizes = [len(sampled(indices, 10, seed)) for seed in range(4000)]
    assert np.mean(sizes) == pytest.approx(10, abs=0.2) and np.var(sizes) == pytest.approx(50 * 0.2 * 0.8, rel=0.1)
    assert set(sampled(indices, 50, 0)) == set(indices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("private"), layers=2)


def config_of(folder, output, **fields):
    return make_config(folder / "bert", folder / "data.csv", output, **{"train__privacy__noise": 0.0, "lora__head": "mixed"} | fields)


def test_without_noise_and_bound_it_is_the_gradient_of_the_mean(folder, tmp_path):
    """All examples in every sample, a clip that bounds nothing: the same step as one over the whole shard, to rounding."""
    fields = {"train__optimizer": "sgd", "train__lr": 0.1, "train__clip": None, "train__local_steps": 1, "train__batch_size": 9,
              "model__dropout": 0.0}
    ends = []
    for privacy in ({"train__privacy__clip": 1e6}, {"train__privacy__noise": None}):
        run, _ = make_run(config_of(folder, tmp_path / "run", **fields | privacy))
        assert all(len(stream.indices) == 9 for stream in run.peers.streams)
        losses = local_phase(run)
        ends.append((run.peers.x.clone(), losses))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "ffa", "salf"])
def test_a_bound_and_noise_change_a_step_and_repeat_it(folder, tmp_path, method):
    def end(**fields):
        run, _ = make_run(config_of(folder, tmp_path / "run", method=method, **fields))
        local_phase(run)
        return run.peers.x.clone()

    plain, noisy = end(), end(train__privacy__noise=0.5)
    assert not torch.equal(plain, noisy) and torch.equal(noisy, end(train__privacy__noise=0.5))
    assert not torch.equal(noisy, end(train__privacy__noise=0.5, train__privacy__secret=True))


def test_stopped_and_resumed_is_never_stopped(folder, tmp_path, monkeypatch):
    def make(path, name, **fields):
        return config_of(folder, path / name, **fields)

    assert_goes_on(make, tmp_path, monkeypatch, 5, train__privacy__noise=0.5, train__rounds=4, train__local_steps=3, eval__every=0,
                   processes=1)


def test_what_a_run_spends_stands_in_it():
    train = make_train(noise=1.0, rounds=5, local_steps=4, batch_size=8)
    found = spent(train, [80, 80, 400])
    assert found["epsilon"][0] == found["epsilon"][1] > found["epsilon"][2] > 0
    assert found["epsilon"][0] == pytest.approx(epsilon(1.0, 0.1, 20, 1e-5))
    assert spent(make_train(noise=0.0), [80])["epsilon"] == [None]


def make_train(**fields):
    from dfl.config import from_dict
    noise = fields.pop("noise")
    return from_dict({"output": "x", "train": {"privacy": {"noise": noise}, **fields}}).train


@pytest.mark.parametrize("fields, words", [
    ({"train__executor": "stacked"}, "train.executor = 'stacked'"), ({"train__accumulation": 2}, "train.accumulation = 2"),
    ({"lora__adapter": "dora", "method": "dora", "lora__head": "frozen"}, "lora.adapter = 'dora' does not give"),
    ({"lora__adapter": "sb", "method": "fed_sb", "lora__head": "frozen", "lora__start": "gradient"}, "lora.start = 'gradient' looks"),
    ({"lora__adapter": "orthogonal", "method": "task_bank"}, "method.layers = 'spectrum' looks at examples")])
def test_what_looks_at_examples_elsewhere_is_refused(folder, tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        check(config_of(folder, tmp_path / "run", **fields))


def test_a_missing_accountant_is_named(folder, tmp_path, monkeypatch):
    from dfl.config import checks
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"dfl\[privacy\]"):
        config_of(folder, tmp_path / "run", train__privacy__noise=1.0)
