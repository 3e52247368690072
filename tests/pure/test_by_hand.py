"""Whole algorithms of what travels and when, each beside a program of its own in plain numpy, on graphs that change where they may."""

import math

import numpy as np
import pytest
import torch

import topologies
from dfl import methods
from dfl.adapters.layout import empty_rows, make_layout
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context
from dfl.seeds import derive
from dfl.transport import InProcess
from dfl.wrappers.muffliato import losses, polynomials

PEERS, SIZE, ROUNDS = 6, 20, 40
CURVATURE = 1 + np.arange(PEERS)[:, None] / 8
CENTRES = np.arange(PEERS)[:, None] + np.sin(np.arange(PEERS)[:, None] * np.arange(1, SIZE + 1))
CHANGING = topologies.build("edge_activation", PEERS, base="complete", p=0.3, seed=4)


def step(x: np.ndarray, lr: float) -> np.ndarray:
    return x - lr * CURVATURE * (x - CENTRES)


def rows_by_round(topology, rounds: int, lr: float, layout=None, head: str = "mixed", **slots) -> tuple[list[np.ndarray], list]:
    """The rows (PEERS, SIZE) behind every round, and its report."""
    layout = make_layout([], head=[("w", (SIZE,))]) if layout is None else layout
    context = Context(layout, head, peers=PEERS, topology=topology, rounds=rounds)
    method = methods.build("lora", context, {}, slots)
    methods.check_topology(method, topology)
    x = empty_rows(PEERS, layout.size, dtype=torch.float64)
    heart, found, reports = Gossip(method, layout, topology, InProcess(), range(PEERS), x), [], []
    for t in range(rounds):
        x.copy_(torch.from_numpy(step(x.numpy(), lr)))
        reports.append(heart.round(t, x, lr=lr, local_steps=1))
        found.append(x.numpy().copy())
    return found, reports


def test_event_triggered_gossip_on_a_graph_that_changes():
    """x <- x + sum_j w_ij(t) (x^_j - x^_i); who fires tells its neighbours, and who is met and does not know it is told x^."""
    threshold, lr = 0.15, 0.05
    found, reports = rows_by_round(CHANGING, ROUNDS, lr, trigger=Choice("event", {"threshold": threshold}))
    x, snapshot, knows, silent = np.zeros((PEERS, SIZE)), np.full((PEERS, SIZE), np.nan), [set() for _ in range(PEERS)], 0
    for t in range(ROUNDS):
        x, w, messages = step(x, lr), CHANGING.matrix(t), 0
        for i in range(PEERS):
            if not math.sqrt(((x[i] - snapshot[i]) ** 2).mean()) < threshold / math.sqrt(t + 1):  # nothing was said yet: it fires
                snapshot[i], knows[i] = x[i], set()
            else:
                silent += 1
            told = {j for j in range(PEERS) if j != i and w[j, i]} - knows[i]
            knows[i] |= told
            messages += len(told)
        x = x + w @ snapshot - w.sum(1, keepdims=True) * snapshot
        np.testing.assert_allclose(found[t], x, rtol=0, atol=1e-12)
        assert reports[t].messages == messages
    assert silent > PEERS * ROUNDS / 10


def test_efhc_on_a_graph_that_changes():
    """Broadcast by rms >= r / b_i / sqrt(t + 1); new links, and links of who broadcasts, are used at both ends."""
    lr, r, bandwidth = 0.05, 8.0, np.array([10.0, 20, 40, 80, 160, 20])
    found, reports = rows_by_round(CHANGING, ROUNDS, lr, trigger=Choice("efhc", {"r": r, "bandwidth": bandwidth.tolist()}))
    x, before, links_before, broadcasts = np.zeros((PEERS, SIZE)), None, None, 0
    for t in range(ROUNDS):
        x = step(x, lr)
        links = (CHANGING.matrix(t) != 0) & ~np.eye(PEERS, dtype=bool)
        degrees = links.sum(1)
        before = x.copy() if before is None else before
        fires = np.sqrt(((x - before) ** 2).mean(1)) >= r / bandwidth / math.sqrt(t + 1)
        before[fires] = x[fires]
        used = links & (fires[:, None] | fires[None, :])
        if links_before is not None:
            used |= links & ~links_before
        beta = np.where(used, 1 / (1 + np.maximum(degrees[:, None], degrees[None, :])), 0)
        x, links_before = x + beta @ x - beta.sum(1, keepdims=True) * x, links
        np.testing.assert_allclose(found[t], x, rtol=0, atol=1e-12)
        assert reports[t].messages == used.sum() and reports[t].broadcasts == fires.sum()
        broadcasts += fires.sum()
    assert 10 < broadcasts < PEERS * ROUNDS - 10


def largest(v: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(v)
    at = np.argsort(-np.abs(v))[:k]
    out[at] = v[at]
    return out


@pytest.mark.parametrize("every", [1, 3])
def test_sparq_with_compressed_differences(every):
    """At every H-th round: fire where ||x - x^||^2 >= c_t lr^2; x^ <- x^ + C(x - x^), the first time in full; x <- x + gamma
    sum_j w_ij (x^_j - x^_i). x^ is what the others hold: what a codec has left out is news still."""
    lr, c, growth, gamma, k = 0.05, 300.0, 0.3, 0.3, 4
    ring = topologies.build("ring", PEERS)
    found, reports = rows_by_round(ring, ROUNDS, lr, codec=Choice("top_k", {"share": k / SIZE, "gamma": gamma}),
                                   trigger=Choice("sparq", {"c": c, "growth": growth, "every": every}))
    x, known, w, silent = np.zeros((PEERS, SIZE)), [None] * PEERS, ring.matrix(0), 0
    for t in range(ROUNDS):
        x = step(x, lr)
        fired = 0
        if (t + 1) % every == 0:
            for i in range(PEERS):
                if known[i] is None:
                    known[i], fired = x[i].copy(), fired + 1
                elif ((x[i] - known[i]) ** 2).sum() >= c * (t + 1) ** growth * lr ** 2:
                    known[i], fired = known[i] + largest(x[i] - known[i], k), fired + 1
            x = x + gamma * (w @ np.stack(known) - np.stack(known))
            silent += PEERS - fired
        np.testing.assert_allclose(found[t], x, rtol=0, atol=1e-6)  # values travel as float32
        assert reports[t].broadcasts == fired
    assert silent > 10


def test_eventgrad_sends_each_tensor_by_what_its_norm_did():
    """tau <- horizon tau; where | ||p|| - ||p||_last | >= tau, or t < initial, p goes and tau <- the mean of its last two slopes."""
    layout = make_layout([], head=[("w", (2, 5)), ("b", (4,)), ("v", (6,))])
    cuts, lr, horizon, initial = [slice(0, 10), slice(10, 14), slice(14, 20)], 0.02, 0.95, 3
    ring = topologies.build("ring", PEERS)
    found, reports = rows_by_round(ring, ROUNDS, lr, layout, trigger=Choice("eventgrad", {"horizon": horizon, "initial": initial}))
    x, known, w = np.zeros((PEERS, SIZE)), np.zeros((PEERS, SIZE)), ring.matrix(0)
    last, threshold, slope, when = (np.zeros((PEERS, 3)) for _ in range(4))
    kept_back = 0
    for t in range(ROUNDS):
        x, numbers = step(x, lr), 0
        for i in range(PEERS):
            for p, cut in enumerate(cuts):
                size = np.linalg.norm(x[i, cut])
                if t == 0:
                    last[i, p] = size
                threshold[i, p] *= horizon
                change = abs(size - last[i, p])
                if change >= threshold[i, p] or t < initial:
                    new = change / max(1, t - when[i, p])
                    threshold[i, p], slope[i, p], last[i, p], when[i, p] = (new + slope[i, p]) / 2, new, size, t
                    known[i, cut] = x[i, cut]
                    numbers += 2 * len(x[i, cut])
                else:
                    kept_back += 1
        x = x + w @ known - known
        np.testing.assert_allclose(found[t], x, rtol=0, atol=1e-12)
        assert sum(one.payload_bytes for one in reports[t].ledger.values()) == 8 * numbers
    assert kept_back > PEERS * 3 * ROUNDS / 10


def cn(draws: np.random.Generator) -> complex:
    return complex(*draws.standard_normal(2)) / math.sqrt(2)


def test_differences_over_the_air_with_fading_noise_and_misalignment():
    """y = sum_j h_j b_j (1 + delta_j) s_j + z of v_j = x_j - r_j, which a receiver scales back and adds to the references it knows."""
    lr, snr, gain, gamma, decay, off, refresh = 0.05, 12.0, 0.3, 0.8, 0.2, 0.1, 4
    ring = topologies.build("ring", PEERS)
    found, _ = rows_by_round(ring, 12, lr, channel=Choice("over_the_air", {
        "snr": snr, "least_gain": gain, "gamma": gamma, "decay": decay, "misalignment": off, "refresh": refresh}))
    x, w, power, silent = np.zeros((PEERS, SIZE)), ring.matrix(0), 1.0, 0
    for t in range(12):
        x = step(x, lr)
        if t % refresh == 0:
            reference = x.copy()
        new = x.copy()
        for i in range(PEERS):
            near, draws = [j for j in range(PEERS) if j != i and w[i, j]], np.random.Generator(np.random.Philox(
                derive(0, "channel", i, i, t)))
            h = {j: cn(draws) for j in near}
            heard = sum(w[i, j] * reference[j] for j in near)
            if t % refresh:
                sends = [j for j in near if abs(h[j]) ** 2 >= gain]
                silent += len(near) - len(sends)
                v = {j: x[j] - reference[j] for j in sends}
                eta = min((power * abs(h[j]) ** 2 / (w[i, j] * v[j].std()) ** 2 for j in sends), default=np.inf)
                y = np.zeros(SIZE, dtype=complex)
                for j in sends:
                    b = w[i, j] * math.sqrt(eta) * v[j].std() * h[j].conjugate() / abs(h[j]) ** 2
                    assert abs(b) ** 2 <= power * (1 + 1e-9)
                    y += h[j] * b * (1 + off * cn(draws)) * (v[j] - v[j].mean()) / v[j].std()
                if sends:
                    y += draws.standard_normal(SIZE) * math.sqrt(10 ** (-snr / 10) / 2)  # the real part of z, all that is used
                    heard = heard + y.real / math.sqrt(eta) + sum(w[i, j] * v[j].mean() for j in sends)
            share = 1 - w[i, i]
            mean = x[i] + gamma / (t + 1) ** decay * (heard / share - x[i])
            new[i] = w[i, i] * x[i] + share * mean
        x = new
        np.testing.assert_allclose(found[t], x, rtol=0, atol=1e-10)
    assert silent > 3


def test_tracking_through_differences_is_tracking_of_what_others_know():
    """K = 1: x <- x + gamma (W - I) x^, c <- c + gamma (W - I) s^ / lr for s = lr (g + c), each behind s^ <- s^ + C(s - s^)."""
    lr, gamma, k, ring = 0.05, 0.2, 4, topologies.build("ring", PEERS)
    layout = make_layout([], head=[("w", (SIZE,))])
    method = methods.build("lora", Context(layout, "mixed", peers=PEERS, topology=ring), {}, {
        "codec": Choice("top_k", {"share": k / SIZE, "gamma": gamma}), "wrapper": Choice("gradient_tracking")})
    rows = empty_rows(PEERS, SIZE, dtype=torch.float64)
    heart = Gossip(method, layout, ring, InProcess(), range(PEERS), rows)
    x, c, w = np.zeros((PEERS, SIZE)), np.zeros((PEERS, SIZE)), ring.matrix(0)
    told: list[dict[str, np.ndarray]] = [{} for _ in range(PEERS)]
    for t in range(30):
        behind = heart.after_step(t, lr=lr, local_steps=1)
        rows.copy_(torch.from_numpy(step(rows.numpy(), lr)))
        for i in range(PEERS):
            rows[i] = behind(i, rows[i], 0)
        heart.round(t, rows, lr=lr, local_steps=1)
        y = step(x, lr) - lr * c
        for i, known in enumerate(told):
            for name, part in (("x", y[i]), ("s", x[i] - y[i])):
                known[name] = known[name] + largest(part - known[name], k) if name in known else part
        known_x, known_s = (np.stack([known[name] for known in told]) for name in "xs")
        x, c = y + gamma * (w @ known_x - known_x), c + gamma * (w @ known_s - known_s) / lr
        np.testing.assert_allclose(rows.numpy(), x, rtol=0, atol=1e-5)  # values travel as float32
    assert np.abs(c).max() > 1


def test_mixing_that_grows_weaker_with_the_rate():
    """x <- x + gamma (lr_t / largest lr so far)^power sum_j w_ij (x_j - x_i), with a warm-up and a fall."""
    layout, ring, gamma, power = make_layout([], head=[("w", (SIZE,))]), topologies.build("ring", PEERS), 0.9, 2
    method = methods.build("lora", Context(layout, "mixed", peers=PEERS, topology=ring), {}, {
        "wrapper": Choice("adaptive_consensus", {"gamma": gamma, "power": power})})
    rows = empty_rows(PEERS, SIZE, dtype=torch.float64)
    heart, x, w = Gossip(method, layout, ring, InProcess(), range(PEERS), rows), np.zeros((PEERS, SIZE)), ring.matrix(0)
    rates = [0.02, 0.05, 0.1, 0.08, 0.04, 0.01, 0.05]
    for t, lr in enumerate(rates):
        rows.copy_(torch.from_numpy(step(rows.numpy(), lr)))
        heart.round(t, rows, lr=lr, local_steps=1)
        x = step(x, lr)
        x = x + gamma * (lr / max(rates[:t + 1])) ** power * (w @ x - x)
        np.testing.assert_allclose(rows.numpy(), x, rtol=0, atol=1e-12)


def test_what_a_peer_leaks_is_the_divergence_of_two_gaussians():
    """Muffliato: message P x_0 of j moves by P_ju where u's value moves by 1, under noise of variance sigma^2 ||P_j||^2; added up
    over messages and over those who send to v, and no more than the noise of u's own."""
    w, sigma, alpha, exchanges = topologies.build("star", 5).matrix(0), 0.8, 3.0, 3
    sent = polynomials(w, exchanges)
    found = losses(w, sent, sigma, alpha)
    for u in range(5):
        for v in range(5):
            total = 0.0
            for p in sent:
                for j in range(5):
                    if j != v and w[v, j]:
                        total += alpha * p[j, u] ** 2 / (2 * sigma ** 2 * sum(p[j, k] ** 2 for k in range(5)))
            assert found[u, v] == pytest.approx(min(total, alpha / (2 * sigma ** 2)), rel=1e-12)
