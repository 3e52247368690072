"""Fed-PLoRA: which slots are drawn, what becomes of them in a mix, and a local phase that trains only them."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from one_round import Built, build, gossip
from test_rules import LAYOUT, NUM, activation, assert_same, complete, mix_once, random_rows, ring, simulated
from tiny_runs import adapter_digests, local_phase, make_config, make_run, put_in, write_data
from torch.func import functional_call

from dfl.adapters.layout import a_view, b_view, make_layout
from dfl.run.build import check
from dfl.run.loop import Hooks, run_rounds
from dfl.run.train import train
from dfl.training.executors import Sequential, Stacked

WIDE = make_layout([("q", 5, 7, 4, 1.0), ("v", 5, 3, 6, 2.0)], [("head", (2, 3))])
COUNTS = [1, 5, 2, 3, 1, 2]


def drawn(rule, layout, t, peer) -> np.ndarray:
    """The slots (R,) of a peer, read off the mask; the same in both factors of all layers, and nothing else is masked."""
    mask = rule.masks(t, peer)
    assert mask.shape == (layout.size,) and mask.dtype == torch.bool and mask[layout.length({"A", "B"}):].all()
    slots = a_view(mask, layout.pairs[0])[:, 0].numpy()
    for pair in layout.pairs:
        assert (a_view(mask, pair).numpy() == slots[:, None]).all() and (b_view(mask, pair).numpy() == slots).all()
    return slots


def wide_rows(seed=0) -> torch.Tensor:
    return torch.randn(NUM, WIDE.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed(rule, x, w, t, layout=WIDE) -> tuple[torch.Tensor, int]:
    out = x.clone()
    traffic = gossip(rule, out, [rule.init(row) for row in x], w, t)
    return out, traffic.message_bytes


def dense(x, w, chosen, layout=WIDE) -> np.ndarray:
    """The rule on the factors of all peers, slot by slot: x (N, D) as numpy, chosen (N, R)."""
    out = x.clone()
    for pair in layout.pairs:
        for view in (lambda x, p: a_view(x, p).mT, b_view):
            values, new = view(x, pair).numpy(), view(out, pair).numpy()
            for i in range(NUM):
                for l in range(pair.rank):  # noqa: E741
                    who = [j for j in range(NUM) if w[i, j] > 0 and chosen[j, l]]
                    if who:
                        new[i, :, l] = sum(w[i, j] * values[j, :, l] for j in who) / sum(w[i, j] for j in who)
    return out.numpy()


def test_draws_are_even_and_differ_between_peers_and_rounds():
    rule, layout = build("plora", WIDE, slots=2), WIDE
    table = np.array([[drawn(rule, layout, t, peer) for peer in range(NUM)] for t in range(300)])
    assert (table.sum(2) == 2).all()
    # every slot in two draws of five, within five standard deviations
    assert np.abs(table.mean((0, 1)) - 0.4).max() < 5 * np.sqrt(0.24 / (300 * NUM))
    for other in (table[:, 1:] == table[:, :-1], table[1:] == table[:-1]):
        assert 0.05 < other.all(2).mean() < 0.2  # by chance one draw in ten is the same
    again, another = (build("plora", WIDE, slots=2, seed=seed) for seed in (0, 1))
    assert all(torch.equal(rule.masks(t, 3), again.masks(t, 3)) for t in range(20))
    assert any(not torch.equal(rule.masks(t, 3), another.masks(t, 3)) for t in range(20))


def test_half_of_the_slots_if_nothing_is_said():
    for rank, half in ((1, 1), (2, 1), (5, 2), (8, 4)):
        layout = make_layout([("q", rank, 3, 3, 1.0)])
        assert drawn(build("plora", layout), layout, 0, 0).sum() == half


@pytest.mark.parametrize("slots", [1, 2, COUNTS])
@pytest.mark.parametrize("w", [ring(), complete()], ids=["ring", "complete"])
def test_each_slot_is_averaged_over_those_who_trained_it(slots, w):
    x, rule = wide_rows(), build("plora", WIDE, slots=slots, head="mixed")
    unheard = 0
    for t in range(4):
        chosen = np.array([drawn(rule, WIDE, t, peer) for peer in range(NUM)])
        assert list(chosen.sum(1)) == ([slots] * NUM if isinstance(slots, int) else slots)
        got, sent = mixed(rule, x, w, t)
        head = WIDE.groups["head"]
        np.testing.assert_allclose(got[:, :head.start], dense(x, w, chosen)[:, :head.start], atol=1e-13)
        np.testing.assert_allclose(got[:, head], w @ x[:, head].numpy(), atol=1e-13)
        # r_j (O + I) numbers a layer and the head, to every neighbour
        sizes = chosen.sum(1) * (7 + 4 + 3 + 6) + 6
        assert sent == 8 * (sizes * ((w > 0).sum(0) - 1)).sum()
        for i in range(NUM):
            left = ~chosen[w[i] > 0].any(0)
            unheard += left.sum()
            for pair in WIDE.pairs:
                assert torch.equal(a_view(got, pair)[i, left], a_view(x, pair)[i, left])
                assert torch.equal(b_view(got, pair)[i][:, left], b_view(x, pair)[i][:, left])
    # one peer trains all, and on the complete graph all receive it
    assert (unheard > 0) != (slots == COUNTS and (w > 0).all())


def test_who_alone_trained_a_slot_keeps_its_bits():
    x, rule = wide_rows().float(), build("plora", WIDE, slots=1)
    got, alone = mixed(rule, x, ring(), 0)[0], 0
    chosen = np.array([drawn(rule, WIDE, 0, peer) for peer in range(NUM)])
    for i in range(NUM):
        if chosen[ring()[i] > 0].sum(0)[chosen[i]] == 1:
            alone += 1
            for pair in WIDE.pairs:
                assert torch.equal(a_view(got, pair)[i, chosen[i]], a_view(x, pair)[i, chosen[i]])
    assert alone


def test_all_slots_are_lora():
    for slots in (2, [2] * NUM):
        torch.testing.assert_close(mix_once("plora", random_rows(), ring(), slots=slots, head="mixed"),
                                   mix_once("lora", random_rows(), ring(), head="mixed"), rtol=0, atol=1e-15)
    assert_same(simulated("plora", activation(), slots=4), simulated("lora", activation()))
    assert build("plora", LAYOUT, slots=2).dated


def test_a_complete_graph_is_the_server():
    """One global model; the server takes each slot's mean over those who trained it and keeps the others."""
    rule, server = build("plora", WIDE, slots=COUNTS), wide_rows()[:1]
    x, change = server.expand(NUM, -1).clone(), torch.Generator().manual_seed(1)
    for t in range(6):
        masks = torch.stack([rule.masks(t, peer) for peer in range(NUM)])
        x = x + 0.1 * masks * torch.randn(x.shape, dtype=x.dtype, generator=change)
        number = masks.sum(0)
        server = torch.where(number > 0, (masks * x).sum(0) / number.clamp_min(1), server)
        x = mixed(rule, x, complete(), t)[0]
        factors = WIDE.length({"A", "B"})
        torch.testing.assert_close(x[:, :factors], server[:, :factors].expand(NUM, -1), rtol=0, atol=1e-13)


def test_means_move_and_ranges_do_not_widen():
    x, rule = wide_rows(), build("plora", WIDE, slots=2)
    got = mixed(rule, x, ring(), 0)[0]
    assert (got.mean(0) - x.mean(0)).abs().max() > 0.1
    assert (got <= x.amax(0) + 1e-12).all() and (got >= x.amin(0) - 1e-12).all()


def test_the_simulator_puts_back_what_is_not_trained():
    start = []

    def vandal(factors, t, trains):
        for pair in factors.values():
            for factor in pair:
                start.append(factor.clone())
                factor.add_(1.0)

    result = simulated_without_edges(vandal, slots=1)
    (a0, b0), (a, b) = start, result.factors["toy"]
    moved = (a != a0).all(2)
    assert (moved.sum(1) == 1).all() and torch.equal((a != a0).any(2), moved)
    assert torch.equal((b != b0).all(1), moved) and torch.equal((b != b0).any(1), moved)


def simulated_without_edges(step, **params):
    from toy import Toy

    from dfl import simulate
    return simulate("plora", activation(0.0), Toy(0).factors(), step, 1, **params)


REFUSED = {"none": 0, "too many": 6, "a flag": True, "no whole number": 2.0, "a word": "half", "an empty list": [],
           "too many in a list": [1, 2, 3, 4, 5, 6], "a flag in a list": [1, 1, 1, 1, 1, False], "too short": [1, 2]}


@pytest.mark.parametrize("slots", REFUSED.values(), ids=REFUSED.keys())
def test_bad_slots_are_refused(slots):
    for layout, rank in ((WIDE, None), (make_layout(()), 5)):
        with pytest.raises(ValueError, match=r"method.slots = .* is not allowed; allowed: null .* from 1 to 5, or a list of 6, one a"):
            build("plora", layout, slots=slots, peers=6, rank=rank)


def test_layers_of_unequal_rank_are_refused():
    with pytest.raises(ValueError, match=r"ranks are \[2, 3\]; allowed: one rank"):
        build("plora", make_layout([("q", 2, 3, 3, 1.0), ("v", 3, 3, 3, 1.0)]))
    with pytest.raises(ValueError, match="'plora' cannot mix peers of unequal ranks"):
        build("plora", WIDE, ranks=COUNTS)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return tiny_models.save(folder / "model", "bert"), write_data(folder), folder / "run"


def configured(pieces, slots="[1, 3, 2, 1]", **fields):
    return make_config(*pieces, **{"method": f"{{name: plora, slots: {slots}}}", "lora__rank": 4, "train__lr": 0.05,
                                   "train__clip": 0.5, "train__weight_decay": 0.1, "model__dropout": 0.0, "eval__every": 0} | fields)


@pytest.mark.parametrize("fields, message", [
    ({"slots": "5"}, r"method.slots = 5 .*from 1 to 4, or a list of 4"), ({"slots": "0"}, "method.slots = 0"),
    ({"slots": "true"}, "method.slots = True"), ({"slots": "[1, 2]"}, r"method.slots = \[1, 2\] .*a list of 4"),
    ({"method": "{name: plora, rank: 4}"}, "method.rank is set by lora.rank"),
    ({"method": "{name: plora, peers: 4}"}, "method.peers is set by peers"),
    ({"lora__rank": "[1, 4, 4, 4]"}, "cannot mix peers of unequal ranks"),
    ({"lora__rank": "{budget_mb: 9, largest: 4}"}, "cannot mix peers of unequal ranks")])
def test_slots_are_refused_before_anything_is_loaded(pieces, fields, message):
    check(configured(pieces))
    with pytest.raises(ValueError, match=message):
        check(configured(pieces, **fields))


@pytest.mark.parametrize("executor", [Sequential(), Stacked()], ids=["sequential", "stacked"])
@pytest.mark.parametrize("optimizer, momentum", [("adamw", 0.0), ("sgd", 0.9)])
def test_what_is_masked_out_moves_neither_in_value_nor_in_moments(pieces, optimizer, momentum, executor):
    """Carried moments and weight decay would move it without any gradient."""
    run, _ = make_run(configured(pieces, train__optimizer=optimizer, train__momentum=momentum, train__state="carried",
                                 train__local_steps=3, lora__head="mixed"))
    peers = run.peers
    for t in range(4):
        before, moments = peers.snapshot()
        local_phase(run, t, executor=executor)
        after, new = peers.snapshot()
        for i in range(4):
            mask = run.gossip.plans(t)[i].mask
            assert torch.equal(after[i, ~mask], before[i, ~mask]) and (~mask).any()
            still = (after[i, mask] == before[i, mask]).float().mean()
            assert still < 0.1, (t, i, still)
            for name, value in new.items():
                peer, group, key = name.split(".")
                if int(peer) == i and key != "step":
                    here = mask[peers.layout.groups[group]]
                    old = moments.get(name, torch.zeros_like(value))
                    assert torch.equal(value[~here], old[~here]) and not torch.equal(value[here], old[here]), (t, name)
    assert any("exp_avg" in name or "momentum" in name for name in new)


@pytest.mark.parametrize("optimizer, lr, decay", [("adamw", 0.05, 0.1), ("sgd", 300.0, 1e-4)])
def test_the_loop_is_folding_training_and_averaging(pieces, optimizer, lr, decay):
    """A twin in plain torch: what is not trained is added to the base weight, an adapter of r_i slots is trained beside it with an
    optimiser that knows nothing else, and each slot is averaged over those who trained it."""
    config = configured(pieces, train__rounds=3, train__local_steps=3, train__optimizer=optimizer, train__momentum=0.5, train__lr=lr,
                        train__eps=1e-5, train__clip=5e-4, train__weight_decay=decay)
    run, loaded = make_run(config)
    net, layout, task, split = loaded.adapted.model.eval(), run.peers.layout, run.task, run.split
    names = {id(p): name for name, p in net.named_parameters()}
    sites = [(names[id(s.module.base_layer.weight)], names[id(s.module.lora_A["default"].weight)],
              names[id(s.module.lora_B["default"].weight)], s.module.base_layer.weight.detach().clone(), s.pair)
             for s in loaded.adapted.sites]
    num, start, w = config.peers, loaded.adapted.start, run.topology.matrix(0)
    x = start.double().expand(num, -1).clone()
    norms = []
    for t in range(3):
        chosen = np.array([drawn(Built(run.gossip.method, layout), layout, t, i) for i in range(num)])
        for i in range(num):
            fixed, leaves = {}, {}
            for base, a, b, weight, pair in sites:
                own_a, own_b = a_view(x[i], pair).float(), b_view(x[i], pair).float()
                fixed[base] = weight + pair.scaling * own_b[:, ~chosen[i]] @ own_a[~chosen[i]]
                leaves[a], leaves[b] = (f.clone().requires_grad_() for f in (own_a[chosen[i]], own_b[:, chosen[i]]))
            params = list(leaves.values())
            solver = (torch.optim.AdamW(params, lr=lr, eps=1e-5, weight_decay=decay) if optimizer == "adamw"
                      else torch.optim.SGD(params, lr=lr, momentum=0.5, weight_decay=decay))
            for k in range(3):
                batch = task.collate([split.features[n] for n in run.peers.streams[i].batch(3 * t + k)])
                solver.zero_grad()
                task.losses(functional_call(net, {**fixed, **leaves}, kwargs=task.inputs(batch)), batch, 1)[0].backward()
                norms.append(float(torch.nn.utils.clip_grad_norm_(params, 5e-4)))
                solver.step()
            for _, a, b, _, pair in sites:
                a_view(x[i], pair)[torch.from_numpy(chosen[i])] = leaves[a].detach().double()
                b_view(x[i], pair)[:, torch.from_numpy(chosen[i])] = leaves[b].detach().double()
        x = torch.from_numpy(mean_over_trainers(x, w, chosen, layout))
    run_rounds(run, Hooks(lambda record: None, lambda: None, lambda: False))
    torch.testing.assert_close(run.peers.x, x.float(), rtol=0, atol=1e-6)
    b = layout.groups["B"]
    assert x[:, b].norm() > 0.5 and min(norms) < 5e-4 < max(norms)


def mean_over_trainers(x, w, chosen, layout) -> np.ndarray:
    weights = w[:, :, None] * chosen  # (N, N, R)
    total = weights.sum(1)
    out = x.clone()
    for pair in layout.pairs:
        for view in (lambda x, p: a_view(x, p).mT, b_view):
            values = view(x, pair).numpy()
            mean = np.einsum("ijr,jor->ior", weights, values) / np.where(total > 0, total, 1)[:, None]
            view(out, pair).numpy()[:] = np.where((total > 0)[:, None], mean, values)
    return out.numpy()


def test_no_mask_is_a_mask_of_everything(pieces):
    """The same bits with and without: other rules pay nothing and see nothing."""
    rows = []
    for masked in (False, True):
        run, _ = make_run(configured(pieces, method="lora", train__state="carried"))
        everything = torch.ones(run.peers.layout.size, dtype=torch.bool)
        if masked:
            schedule = run.gossip.method.schedule
            plan = lambda t, peer, of=schedule.plan, mask=everything: of(t, peer)._replace(mask=mask)  # noqa: E731
            put_in(run, schedule=schedule._replace(plan=plan))
        run_rounds(run, Hooks(lambda record: None, lambda: None, lambda: False))
        rows.append(run.peers.x.clone())
    assert torch.equal(*rows)


def test_a_run_learns_tells_its_slots_and_sends_their_bytes(pieces, tmp_path):
    config = configured(pieces[:2] + (tmp_path / "run",), slots="[1, 3, 2, 1]", train__rounds=6)
    assert train(config) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert records[-1]["train_loss"]["mean"] < records[0]["train_loss"]["mean"]
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["facts"]["method"] == {"slots": [1, 3, 2, 1]}
    length = described["facts"]["state_length"]
    # a ring: each message goes to two neighbours; float32
    assert {record["message_bytes"] for record in records} == {4 * 2 * (1 + 3 + 2 + 1) * length // 4}
    assert len(adapter_digests(tmp_path / "run")) == 5
