"""Differential privacy of each peer's examples: what a step of DP-SGD adds up, and what all steps together spend.

A peer's messages are functions of its noisy steps, so that whatever others see of it costs no more than its own steps.
Training losses in the records are those of the examples, and no part of the guarantee: they stay where the peer is.
"""

import math
import os
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.config import PrivacyConfig, TrainConfig
from dfl.seeds import derive
from dfl.training.stream import num_steps


def sampled(indices: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    """Each example by itself with probability batch_size / n, any number of them: Poisson sampling, which the accountant counts on."""
    draw = np.random.Generator(np.random.Philox(seed)).random(len(indices))
    return indices[draw < batch_size / len(indices)]


def noisy_mean(gradients: Tensor, layout: Layout, trains: Collection[str], settings: PrivacyConfig, batch_size: int, seed: int,
               mask: Tensor | None = None) -> Tensor:
    """(sum_e g_e min(1, C / ||g_e||) + N(0, (sigma C)^2)) / batch_size of gradients (B, D) by example, in the groups that are trained.

    C = settings.clip bounds what one example adds, over all trained factors together; one more or less moves the sum by C
    at most, whatever B is, so that the sum is divided by the expected number. mask (D,): the numbers that are trained.
    Abadi et al. 2016, arXiv 1607.00133.
    """
    trained = torch.zeros(layout.size, dtype=torch.bool, device=gradients.device)
    for cut in layout.columns(trains):
        trained[cut] = True
    if mask is not None:
        trained &= mask.to(trained.device)
    gradients = gradients * trained
    factors = (settings.clip / gradients.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)
    assert settings.noise is not None
    noise = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)).to(gradients) * trained
    return ((gradients * factors[:, None]).sum(0) + settings.noise * settings.clip * noise) / batch_size


def noise_seed(settings: PrivacyConfig, seed: int, peer: int, number: int) -> int:
    """Of the noise of a peer's step: a function of the run's seed, or one that nobody can know."""
    if settings.secret:
        return int.from_bytes(os.urandom(8), "big") >> 1
    return derive(seed, "noise", peer, number)


def epsilon(noise: float, share: float, steps: int, delta: float) -> float:
    """epsilon at `delta` of `steps` steps with noise multiplier `noise`, each on a Poisson sample of `share` of the examples.

    Neighbouring data differ by one example that is there or not. By privacy loss distributions (Koskela et al. 2020, arXiv
    1906.03049) of the package dp-accounting, which does nothing else and is kept by those who keep the theory: opacus
    would bring an optimiser and hooks of its own beside it.
    """
    if noise == 0:
        return math.inf
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    step = dp_event.PoissonSampledDpEvent(share, dp_event.GaussianDpEvent(noise))
    spent = PLDAccountant().compose(dp_event.SelfComposedDpEvent(step, steps))
    return float(spent.get_epsilon(delta))


def spent(train: TrainConfig, sizes: Sequence[int]) -> dict[str, object]:
    """What the whole run spends of each peer's privacy, for peers of `sizes` examples."""
    settings, found = train.privacy, dict[tuple[float, int], float]()
    assert settings.noise is not None
    for_peers: list[float | None] = []
    for size in sizes:
        steps = train.rounds * num_steps(train, math.ceil(size / train.batch_size))
        key = (min(1.0, train.batch_size / size), steps)
        if key not in found:
            found[key] = epsilon(settings.noise, *key, settings.delta)
        for_peers.append(found[key] if math.isfinite(found[key]) else None)
    return {"delta": settings.delta, "epsilon": for_peers, "noise": settings.noise, "clip": settings.clip,
            "neighbours": "one example more or less"}
