"""Adapters beside plain LoRA of one rank, through the real loop: what is trained, mixed, saved, and loaded again by stock PEFT."""

import copy
from functools import cache

import numpy as np
import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import local_phase, make_config, make_run, write_data
from transformers import AutoModelForSequenceClassification

from dfl.adapters.layout import a_view, b_view
from dfl.adapters.residuals import residual_rows
from dfl.run import train as running
from dfl.run.checkpoint import Checkpointer
from dfl.run.loop import Hooks, evaluate, run_rounds
from dfl.store.checkpoints import latest
from dfl.training.executors import Sequential, Stacked

QUIET = Hooks(lambda record: None, lambda: None, lambda: False)
# name -> what a run sets beside tiny_runs' own; every one trains, mixes and evaluates in its own way
KINDS = {
    "unequal ranks": {"method": "decaf", "lora__rank": "[1, 2, 3, 4]", "lora__alpha": "[2, 4, 2, 8]",
                      "lora__rslora": "[true, false, true, false]"},
    "residual": {"method": "{name: fedhl, residual_rank: 4}", "lora__rank": "[1, 2, 3, 4]"},
    "fedex": {"method": "{name: fedex, residual_rank: 4}"},
    "choco": {"method": "{name: fedex_choco, residual_rank: 6}"},
    "flora": {"method": "{name: flora, residual_rank: 6}", "topology": "complete"},
    "carried rank": {"method": "carry", "lora__rank": "[1, 2, 3, 4]"},
    "dora": {"lora__adapter": "dora"},
    "dora, exact": {"lora__adapter": "dora", "method": "dora"},
    "hira": {"lora__adapter": "hira"},
    "hira, weighted": {"lora__adapter": "hira", "method": "hira"},
    "pissa": {"lora__start": "pissa"},
    "olora and a residual": {"lora__start": "olora", "method": "{name: fedhl, residual_rank: 4}"},
    "cores": {"method": "fed_sb", "lora__adapter": "sb"},
    "cores alone": {"method": "local", "lora__adapter": "sb"},
    "cores at the first gradient": {"method": "fed_sb", "lora__adapter": "sb", "lora__start": "gradient", "lora__start_step": 1.0},
    "heads": {"method": "ravan", "lora__adapter": "ravan", "lora__heads": 2, "lora__rank": 4},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    tiny_models.save(root / "bert", "bert", layers=2)
    tiny_models.save(root / "gpt2", "gpt2", layers=2)
    write_data(root)
    return root


@pytest.fixture(scope="module")
def stock_base(folder):
    """A fresh model as transformers makes it of a folder, with a head of seed 0; PEFT changes the one that it is given."""
    @cache
    def read(model):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder / model, num_labels=2)
    return lambda model: copy.deepcopy(read(model))


def configure(folder, output, kind, model="bert", **fields):
    fields = {"train__lr": 0.05, "model__dropout": 0.0, "measure__layers": 2} | KINDS[kind] | fields
    return make_config(folder / model, folder / "data.csv", output, **fields)


@pytest.mark.long
@kinds
def test_a_run_learns_mixes_and_goes_on_bit_for_bit(folder, tmp_path, kind):
    config = configure(folder, tmp_path / "whole", kind, train__rounds=4)
    run, _ = make_run(config)
    start, records = run.rows().x.clone(), []
    run_rounds(run, Hooks(records.append, lambda: None, lambda: False))
    assert not torch.equal(run.rows().x, start)
    measured = [r["measures"]["aggregation_error"] for r in records if "measures" in r]
    assert measured and np.isfinite(measured).all()
    assert records[2]["layers"].keys() == {"aggregation_error", "tail_energy", "r_weak", "r_strong", "norm_A", "norm_B",
                                           "alignment_angle"}
    # stopped after two rounds, saved, resumed elsewhere
    first, loaded = make_run(configure(folder, tmp_path / "half", kind, train__rounds=4))
    first.config = configure(folder, tmp_path / "half", kind, train__rounds=2)
    run_rounds(first, QUIET)
    running.save(first, Checkpointer(tmp_path / "half", first.transport, 0, loaded.bundle.base_name))
    second, _ = make_run(configure(folder, tmp_path / "half", kind, train__rounds=4))
    running.restore(second, latest(tmp_path / "half"))
    run_rounds(second, QUIET)
    assert torch.equal(second.peers.x, run.peers.x)
    if run.rule.residual is not None:
        assert torch.equal(second.gossip.residuals(), run.gossip.residuals()) and run.gossip.residuals().abs().sum() > 0


@pytest.mark.long
@kinds
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_stock_peft_computes_what_the_run_evaluates(folder, stock_base, tmp_path, kind, model):
    config = configure(folder, tmp_path / "run", kind, model, train__rounds=2)
    run, loaded = make_run(config)
    run_rounds(run, QUIET)
    amplify(run)
    running.save(run, Checkpointer(tmp_path / "run", run.transport, 0, loaded.bundle.base_name))
    checkpoint = latest(tmp_path / "run")
    batch = loaded.bundle.task.collate([loaded.bundle.valid.features[i] for i in range(4)])
    inputs = loaded.bundle.task.inputs(batch)
    unchanged = base_logits(loaded, inputs)
    for row in range(4):
        with torch.no_grad(), Sequential().bound(run.peers.adapted, run.rows(), None, [row]) as forward:
            ours = forward(inputs, [row]).logits
        base = stock_base(model)
        base.config.pad_token_id = loaded.bundle.model.config.pad_token_id
        stock = PeftModel.from_pretrained(base, checkpoint / f"peer-{row}").eval()
        with torch.no_grad():
            theirs = stock(**inputs).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        change = (ours - unchanged).abs().max()
        assert change > 1e-5 and (theirs - ours).abs().max() < 1e-2 * change


def amplify(run):
    """Values so large that a factor, a scaling or a residual left out would show in the output of a model with tiny weights."""
    noise = torch.randn(run.peers.x.shape, generator=torch.Generator().manual_seed(0))
    run.peers.x.copy_(torch.where(run.peers.x != 0, run.peers.x + 2 * noise, 0))
    for state in run.gossip.state["rule"].values():
        if "residual" in state:
            state["residual"] *= 1e3


def base_logits(loaded, inputs):
    with torch.no_grad(), loaded.adapted.model.disable_adapter():
        return loaded.adapted.model(**inputs).logits


@pytest.mark.long
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith(("dora", "hira"))])
def test_both_executors_agree(folder, tmp_path, kind):
    runs = []
    for executor in (Sequential(), Stacked()):
        run, _ = make_run(configure(folder, tmp_path / "run", kind, train__rounds=1))
        run.executor = executor
        run_rounds(run, QUIET)
        runs.append(run)
    rows = runs[0].rows()
    one, other = runs[0].evaluator.sums(rows, Sequential()), runs[0].evaluator.sums(rows, Stacked())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.x, runs[1].rows().x, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["dora", "hira"])
def test_adapters_of_pefts_own_layers_are_not_stacked(folder, tmp_path, kind):
    with pytest.raises(ValueError, match=f"cannot run lora.adapter = '{kind}'; allowed: sequential"):
        make_run(configure(folder, tmp_path / "run", kind, train__executor="stacked"))


class TestRanks:
    def test_slots_beyond_a_peers_rank_stay_zero(self, folder, tmp_path):
        run, _ = make_run(configure(folder, tmp_path / "run", "unequal ranks"))
        run_rounds(run, QUIET)
        for row, rank in enumerate((1, 2, 3, 4)):
            for pair in run.peers.layout.pairs:
                assert pair.rank == 4
                assert (a_view(run.peers.x, pair)[row, rank:] == 0).all() and (b_view(run.peers.x, pair)[row, :, rank:] == 0).all()
                assert (b_view(run.peers.x, pair)[row, :, :rank] != 0).any()

    def test_scalings_are_folded_before_mixing(self, folder, tmp_path):
        """(r, alpha) of four peers, two of them rsLoRA: the mix of changes of weights is the mix that a dense computation finds."""
        run, _ = make_run(configure(folder, tmp_path / "run", "unequal ranks", lora__rank="[4, 4, 4, 4]",
                                    lora__alpha="[4, 8, 16, 8]"))
        scalings = [4 / 2, 8 / 4, 16 / 2, 8 / 4]
        run.peers.x.copy_(torch.randn(run.peers.x.shape, generator=torch.Generator().manual_seed(0)))
        x, w = run.peers.x.clone(), run.topology.matrix(0)
        from dfl.run.loop import _exchange
        _exchange(run, 0)
        for pair in run.peers.layout.pairs:
            before = np.stack([s * (b_view(x, pair)[i] @ a_view(x, pair)[i]).double().numpy() for i, s in enumerate(scalings)])
            after = np.stack([s * (b_view(run.peers.x, pair)[i] @ a_view(run.peers.x, pair)[i]).double().numpy()
                              for i, s in enumerate(scalings)])
            u, s, vh = np.linalg.svd(np.einsum("ij,jok->iok", w, before), full_matrices=False)
            np.testing.assert_allclose(after, (u[..., :4] * s[..., None, :4]) @ vh[..., :4, :], atol=2e-4 * np.abs(before).max())

    def test_messages_carry_the_rank_of_their_peer(self, folder, tmp_path):
        run, _ = make_run(configure(folder, tmp_path / "run", "unequal ranks"))
        records = []
        run_rounds(run, Hooks(records.append, lambda: None, lambda: False))
        per_rank, layers = sum(p.d_in + p.d_out for p in run.peers.layout.pairs), len(run.peers.layout.pairs)
        # a ring of four: every message goes to two neighbours
        assert records[1]["message_bytes"] == 2 * sum(8 * layers + 4 * rank * per_rank for rank in (1, 2, 3, 4))

    def test_by_memory_budget(self, folder, tmp_path):
        run, _ = make_run(configure(folder, tmp_path / "run", "unequal ranks", lora__alpha=16.0, lora__rslora="false",
                                    lora__rank="{budget_mb: [0.006, 0.012, 0.012, 1.0], largest: 8}"))
        per_rank = 16 * sum(p.d_in + p.d_out for p in run.peers.layout.pairs)
        assert run.peers.adapted.ranks.ranks == tuple(min(8, int(b * 1e6 / per_rank)) for b in (0.006, 0.012, 0.012, 1.0))
        assert len(set(run.peers.adapted.ranks.ranks)) == 3
        run_rounds(run, QUIET)

    def test_drawn_from_choices(self, folder, tmp_path):
        run, _ = make_run(configure(folder, tmp_path / "run", "unequal ranks", lora__rank="{choices: [2, 4], weights: [0.5, 0.5]}",
                                    lora__alpha=16.0, lora__rslora="false", seed=2))
        assert set(run.peers.adapted.ranks.ranks) == {2, 4}

    @pytest.mark.parametrize("fields, said", [
        ({"method": "lora"}, "method.name = 'lora' cannot mix peers of unequal ranks"),
        ({"method": "ffa"}, "cannot mix peers of unequal ranks"),
        ({"lora__rank": "[1, 2]"}, "lora.rank = [1, 2] is not allowed; allowed: one value, or a list of 4"),
        ({"lora__rank": "[1, 2, 0, 4]"}, "lora.rank[2] = 0 is not allowed; allowed: a whole number from 1"),
        ({"lora__rank": "{choices: [2], budget_mb: 3}"}, "give exactly one of them"),
        ({"lora__rank": "{choices: [2, 4], weights: [1]}"}, "lora.rank.weights"),
        ({"lora__rank": "{budget_mb: 0.000001}", "lora__alpha": 16.0, "lora__rslora": "false"}, "does not hold rank 1"),
        ({"lora__start": "pissa"}, "needs one lora.rank and one lora.alpha for all peers"),
        ({"lora__adapter": "dora"}, "needs one lora.rank and one lora.alpha for all peers")])
    def test_what_does_not_fit_is_refused(self, folder, tmp_path, fields, said):
        with pytest.raises(ValueError) as error:
            make_run(configure(folder, tmp_path / "run", "unequal ranks", **fields))
        assert said in str(error.value)


@pytest.mark.parametrize("fields, said", [
    ({"lora__adapter": "sb", "method": "lora"}, "allowed: fed_sb, local"),
    ({"lora__adapter": "sb", "method": "fed_sb", "lora__alpha": "[1, 2, 1, 1]"}, "needs one lora.rank and one lora.alpha"),
    ({"lora__adapter": "lora", "method": "fed_sb"}, "method.name = 'fed_sb' needs lora.adapter = 'sb'"),
    ({"lora__adapter": "dora", "method": "fedhl"}, "keeps a residual beside B A"),
    ({"lora__adapter": "hira", "method": "flora_na"}, "fits its coefficients to B A, but lora.adapter = 'hira' changes a weight by"),
    ({"lora__adapter": "dora", "lora__start": "pissa"}, "lora.start = 'pissa' is for"),
    ({"lora__adapter": "ravan", "method": "ravan", "lora__heads": 3, "lora__rank": 4}, "is not a multiple of lora.heads = 3"),
    ({"lora__adapter": "sb", "method": "fed_sb", "lora__rank": 40}, "orthonormal"),
    ({"method": "{name: flora}", "topology": "ring"}, "needs every peer to receive from every other")])
def test_what_does_not_fit_is_refused(folder, tmp_path, fields, said):
    with pytest.raises(ValueError) as error:
        make_run(make_config(folder / "bert", folder / "data.csv", tmp_path / "run", **fields))
    assert said in str(error.value)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_constant_residual_goes_where_the_rows_are(folder, tmp_path, start):
    """It is made on the CPU; a device without memory stands for a GPU."""
    run, _ = make_run(configure(folder, tmp_path / "run", "pissa", lora__start=start))
    x = torch.empty(3, run.peers.layout.size, device="meta")
    beside = residual_rows(run.peers.adapted, None, x)
    assert beside.device == x.device and beside.shape == (3, run.peers.adapted.residual.size)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_at_the_weights_own_directions_changes_nothing_at_first(folder, tmp_path, start):
    run, _ = make_run(configure(folder, tmp_path / "run", "pissa", lora__start=start))
    site = run.peers.adapted.sites[0]
    x = torch.randn(3, site.pair.d_in)
    with torch.no_grad(), Sequential().bound(run.peers.adapted, run.rows(), None, [0]):
        torch.testing.assert_close(site.module(x), site.module.base_layer(x), rtol=0, atol=1e-6)
    product = site.pair.scaling * b_view(run.peers.x[0], site.pair) @ a_view(run.peers.x[0], site.pair)
    weight = site.weight.detach()
    if start == "pissa":
        u, s, vh = torch.linalg.svd(weight)
        torch.testing.assert_close(product, (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=1e-5)
    else:
        q, r = torch.linalg.qr(weight)
        torch.testing.assert_close(product, q[:, :2] @ r[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "fedex", "choco"])
def test_the_consensus_model_is_the_mean_of_whole_models(folder, tmp_path, kind):
    """With ranks and residuals that suffice, what is evaluated as consensus is the dense mean of E_i + B_i A_i."""
    fields = {"lora__rank": 4} if kind == "residual" else {}
    run, _ = make_run(configure(folder, tmp_path / "run", kind, method=f"{{name: {run_name(kind)}, residual_rank: 16}}", **fields))
    run_rounds(run, QUIET)
    x, kept = run.peers.x, run.gossip.residuals()
    rows = run.consensus()
    for pair, other in zip(run.peers.layout.pairs, run.rule.residual.pairs, strict=True):
        mean = (b_view(x, pair) @ a_view(x, pair) + b_view(kept, other) @ a_view(kept, other)).mean(0)
        found = b_view(rows.x, pair) @ a_view(rows.x, pair) + b_view(rows.residual, other) @ a_view(rows.residual, other)
        torch.testing.assert_close(found[0], mean, rtol=0, atol=1e-5 * float(mean.abs().max() + 1))
    assert evaluate(run)["consensus"]["accuracy"] >= 0


def run_name(kind):
    return {"residual": "fedhl", "fedex": "fedex", "choco": "fedex_choco"}[kind]


class TestMoments:
    def states(self, folder, tmp_path, policy):
        run, _ = make_run(configure(folder, tmp_path / "run", "unequal ranks", lora__rank=2, lora__alpha=4.0, lora__rslora="false",
                                    train__state="carried", train__at_refactor=policy))
        local_phase(run)
        before = run.peers.snapshot()
        from dfl.run.loop import _exchange
        _exchange(run, 0)
        return run, before, run.peers.snapshot()

    def test_rotate_turns_them_with_the_factors(self, folder, tmp_path):
        """The rotation that takes the old factors closest to the new ones, from dense numpy, takes the first moments along."""
        run, (x, moments), (mixed, turned) = self.states(folder, tmp_path, "rotate")
        pair = run.peers.layout.pairs[0]
        for i in range(4):
            old_a, old_b = (view(x[i], pair).double().numpy() for view in (a_view, b_view))
            new_a, new_b = (view(mixed[i], pair).double().numpy() for view in (a_view, b_view))
            cross = old_a @ new_a.T / np.square(new_a).sum() + old_b.T @ new_b / np.square(new_b).sum()
            u, _, vh = np.linalg.svd(cross)
            r = u @ vh
            for key, turn in (("exp_avg", r), ("exp_avg_sq", r ** 2)):
                in_a, in_b = slice(0, pair.rank * pair.d_in), slice(0, pair.rank * pair.d_out)
                before, after = (m[f"{i}.A.{key}"][in_a].view(pair.rank, -1).double().numpy() for m in (moments, turned))
                np.testing.assert_allclose(after, turn.T @ before, atol=1e-6)
                before, after = (m[f"{i}.B.{key}"][in_b].view(pair.d_out, -1).double().numpy() for m in (moments, turned))
                np.testing.assert_allclose(after, before @ turn, atol=1e-6)
            assert torch.equal(turned[f"{i}.A.step"], moments[f"{i}.A.step"])

    def test_keep_and_reset(self, folder, tmp_path):
        _, (_, moments), (_, kept) = self.states(folder, tmp_path, "keep")
        assert all(torch.equal(kept[name], value) for name, value in moments.items())
        _, _, (_, dropped) = self.states(folder, tmp_path, "reset")
        assert dropped == {}


def test_a_saved_adapter_has_the_rank_that_it_fills(folder, tmp_path):
    run, loaded = make_run(configure(folder, tmp_path / "run", "unequal ranks"))
    run_rounds(run, QUIET)
    running.save(run, Checkpointer(tmp_path / "run", run.transport, 0, loaded.bundle.base_name))
    for peer, rank in enumerate((1, 2, 3, 4)):
        tensors = load_file(latest(tmp_path / "run") / f"peer-{peer}" / "adapter_model.safetensors")
        assert {v.shape[0] for name, v in tensors.items() if "lora_A" in name} == {rank}
