"""Bases at the first gradient: the range finder and its hooks against dense gradients, what all peers share, what is refused."""

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import make_config, make_run, write_data
from transformers.pytorch_utils import Conv1D

from dfl.adapters.layout import a_view, b_view, head_view
from dfl.run import train as running
from dfl.run.build import assemble, bases_of, check, check_same_start, load
from dfl.run.checkpoint import Checkpointer, read_state
from dfl.run.evaluation import evaluate_run
from dfl.run.loop import Hooks, evaluate, run_rounds
from dfl.run.runtime import start
from dfl.store.checkpoints import latest
from dfl.training.starts import gradient_products, leading_directions
from dfl.training.stream import DataStream

QUIET = Hooks(lambda record: None, lambda: None, lambda: False)
SB = {"method": "fed_sb", "lora__adapter": "sb", "lora__start": "gradient", "train__lr": 0.05, "model__dropout": 0.0,
      "model__head_std": 0.5}
RAVAN = SB | {"method": "ravan", "lora__adapter": "ravan", "lora__rank": 4, "lora__heads": 2}
# nn.Linear, and Conv1D with weights (I, O), not all of them square
MODELS = {"bert": "[query, value, intermediate.dense]", "gpt2": "[c_attn, c_fc]"}
models = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("starts")
    for model in MODELS:
        weights = tiny_models.save(root / model, model) / "model.safetensors"
        # with weights as small as a fresh model's, attention is even and all gradients have one direction
        save_file({name: 8 * w if w.dim() == 2 else w for name, w in load_file(weights).items()}, weights, metadata={"format": "pt"})
    write_data(root)
    return root


def configure(folder, output, model="bert", **fields):
    return make_config(folder / model, folder / "data.csv", output, **(SB | {"lora__targets": MODELS[model]} | fields))


def dense_gradients(loaded, config):
    """dL/dW0 (O, I) of the mean loss over peer 0's first examples, one after the other, by autograd on the weights themselves."""
    bundle, adapted = loaded.bundle, loaded.adapted
    first = DataStream(loaded.parts[0], 1, config.seed, 0)
    num = min(config.lora.start_samples, len(loaded.parts[0]))
    weights = [site.module.get_base_layer().weight for site in adapted.sites]
    total = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    for w in weights:
        w.requires_grad_()
    with adapted.model.disable_adapter():
        for number in range(num):
            batch = bundle.task.collate([bundle.train.features[i] for i in first.batch(number)])
            loss = bundle.task.losses(adapted.model(**bundle.task.inputs(batch)), batch, 1).sum() / num
            for sum_, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
                sum_ += gradient
    for w in weights:
        w.requires_grad_(False)
    return [g.mT.numpy() if isinstance(site.module.get_base_layer(), Conv1D) else g.numpy()
            for g, site in zip(total, adapted.sites, strict=True)]


@models
def test_bases_are_the_leading_directions_of_the_dense_gradient(folder, tmp_path, model):
    """With rank 8 and 8 directions more, of 16 that there are, the range finder misses nothing."""
    config = configure(folder, tmp_path / "run", model, lora__rank=8, lora__alpha=24.0, lora__start_samples=6, lora__start_step=0.5)
    run, loaded = make_run(config)
    adapted = run.peers.adapted
    for index, (pair, g) in enumerate(zip(adapted.lora.pairs, dense_gradients(loaded, config), strict=True)):
        u, s, vh = np.linalg.svd(g)
        assert g.shape == (pair.d_out, pair.d_in) and s[1] - s[2] > 0.01 * s[0]  # else the subspaces are not determined
        a, b = (view(adapted.cores.bases, pair).double().numpy() for view in (a_view, b_view))
        np.testing.assert_allclose(b.T @ g @ a.T, np.diag(s[:8]), atol=2e-6 * s[0])
        # cosines of the angles between the subspaces of the first two
        for ours, dense in ((b[:, :2], u[:, :2]), (a[:2].T, vh[:2].T)):
            np.testing.assert_allclose(np.linalg.svd(ours.T @ dense)[1], 1, atol=2e-6)
            np.testing.assert_allclose(ours @ ours.T, dense @ dense.T, atol=1e-4)
        assert (np.take_along_axis(a, np.abs(a).argmax(1)[:, None], 1) > 0).all()
        # the core begins where a step of gradient descent takes the weight
        core = head_view(run.peers.x, adapted.cores.tensors(index)["core"])[:, 0].double().numpy()
        for row in core:
            np.testing.assert_allclose(pair.scaling * row, -0.5 * np.diag(s[:8]), atol=2e-6 * s[0])
        assert pair.scaling == 3.0


@pytest.mark.parametrize("power_passes", [0, 1])
def test_a_gradient_of_low_rank_is_found_exactly(power_passes):
    rng = np.random.default_rng(0)
    dense = [rng.normal(size=(o, 5)) @ rng.normal(size=(5, i)) for o, i in ((30, 20), (12, 40))]
    found = leading_directions(products_of(dense), [(30, 20), (12, 40)], 3, 0, oversampling=2, power_passes=power_passes)
    for g, (u, s, v) in zip(dense, found, strict=True):
        want = np.linalg.svd(g)
        np.testing.assert_allclose(s, want[1][:3], rtol=1e-12)
        np.testing.assert_allclose((u * s) @ v.mT, (want[0][:, :3] * want[1][:3]) @ want[2][:3], atol=1e-12 * want[1][0])


def test_power_passes_turn_towards_the_leading_directions():
    """Singular values that fall like 1/k: the part of the best energy that the range finder misses shrinks with every power pass."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(n, 60)))[0] for n in (90, 70))
    spectrum = 1 / np.arange(1, 61)
    g = (u * spectrum) @ v.T
    missed = []
    for power_passes in (0, 1, 2):
        (left, s, right), = leading_directions(products_of([g]), [g.shape], 8, 0, power_passes=power_passes)
        np.testing.assert_allclose(left.mT @ left, np.eye(8), atol=1e-12)
        np.testing.assert_allclose(right.mT @ right, np.eye(8), atol=1e-12)
        assert (s.numpy() <= spectrum[:8] * (1 + 1e-12)).all()
        missed.append(1 - float((s ** 2).sum() / (spectrum[:8] ** 2).sum()))
    assert missed[0] > 5 * missed[1] > 5 * missed[2] > 0 and missed[1] < 5e-3


def products_of(dense):
    tensors = [torch.from_numpy(g) for g in dense]
    return lambda thin, transposed: [(g.mT if transposed else g) @ t for g, t in zip(tensors, thin, strict=True)]


@models
def test_products_do_not_depend_on_how_examples_are_batched(folder, tmp_path, model):
    config = configure(folder, tmp_path / "run", model)
    check(config)
    loaded = load(config, torch.device("cpu"))
    task, features = loaded.bundle.task, loaded.bundle.train.features
    generator = torch.Generator().manual_seed(0)
    thin = [torch.randn(site.pair.d_in, 3, dtype=torch.float64, generator=generator) for site in loaded.adapted.sites]
    whole = gradient_products(loaded.adapted, task, [(1.0, task.collate(features[:6]))])(thin, False)
    cut = [(4 / 6, task.collate(features[:4])), (2 / 6, task.collate(features[4:6]))]
    parts = gradient_products(loaded.adapted, task, cut)(thin, False)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
    assert all(not p.requires_grad and p.grad is None for p in loaded.adapted.model.parameters())
    assert not any(s.module.get_base_layer()._forward_hooks for s in loaded.adapted.sites)


def test_without_a_step_the_model_is_the_base_model(folder, tmp_path):
    run, _ = make_run(configure(folder, tmp_path / "run"))
    seeded, _ = make_run(configure(folder, tmp_path / "seeded", lora__start="kaiming"))
    assert torch.equal(run.peers.x, seeded.peers.x)
    assert not torch.equal(run.peers.adapted.cores.bases, seeded.peers.adapted.cores.bases)
    assert evaluate(run)["loss"] == evaluate(seeded)["loss"]


def test_the_first_step_goes_where_the_gradient_is(folder, tmp_path):
    """With SGD, a step of the core from the bases of the batch itself takes the loss down by the most that rank 2 can: the drop to
    first order is the energy of the two leading singular values, of which seeded bases hold little."""
    energies = []
    for name in ("gradient", "kaiming"):
        run, loaded = make_run(config := configure(folder, tmp_path / name, lora__start=name))
        total = held = 0.0
        for pair, g in zip(run.peers.adapted.lora.pairs, dense_gradients(loaded, config), strict=True):
            a, b = (view(run.peers.adapted.cores.bases, pair).double().numpy() for view in (a_view, b_view))
            total, held = total + np.square(np.linalg.svd(g)[1][:2]).sum(), held + np.square(b.T @ g @ a.T).sum()
        energies.append(held / total)
    assert energies[0] > 1 - 1e-5 and energies[1] < 0.3


def test_heads_take_the_directions_in_order(folder, tmp_path):
    run, loaded = make_run(config := configure(folder, tmp_path / "run", **(RAVAN | {"lora__start_step": 0.1})))
    adapted = run.peers.adapted
    for index, (pair, g) in enumerate(zip(adapted.lora.pairs, dense_gradients(loaded, config), strict=True)):
        cores, scales = (head_view(run.peers.x[0], place) for place in adapted.cores.tensors(index).values())
        s = np.linalg.svd(g)[1]
        np.testing.assert_allclose(-cores.diagonal(dim1=1, dim2=2).flatten() * pair.scaling / 0.1, s[:4], atol=2e-5 * s[0])
        assert (scales == 1).all() and cores.count_nonzero() == 4


@pytest.mark.long
@pytest.mark.parametrize("kind", [SB, RAVAN], ids=["sb", "ravan"])
def test_a_run_begins_alike_and_goes_on_bit_for_bit(folder, tmp_path, kind):
    config = configure(folder, tmp_path / "whole", **kind)
    run, _ = make_run(config)
    again, _ = make_run(config)
    assert torch.equal(run.peers.adapted.cores.bases, again.peers.adapted.cores.bases)
    run_rounds(run, QUIET)
    assert running.train(configure(folder, tmp_path / "half", **kind, train__rounds=2)) == 0
    assert running.train(configure(folder, tmp_path / "half", **kind), resume=True) == 0
    saved = latest(tmp_path / "half")
    assert torch.equal(torch.stack([read_state(saved, [p])[f"x.{p}"] for p in range(4)]), run.peers.x)
    assert torch.equal(bases_of(saved), run.peers.adapted.cores.bases)


def test_bases_come_from_the_checkpoint_and_not_from_the_examples_at_hand(folder, tmp_path):
    """`dfl eval` on other data, of which no gradient gives the run's bases again."""
    config = configure(folder, tmp_path / "run", train__rounds=2)
    assert running.train(config) == 0
    other = tmp_path / "other.csv"
    rows = [f"{word} film,{label}" for word in ("good", "bad", "not") for label in ("yes", "no")]
    other.write_text("\n".join(["text,label", *rows]) + "\n")
    result = evaluate_run(tmp_path / "run", data=str(other))
    single = evaluate_run(tmp_path / "run")
    assert result["examples"] == 6 and single["loss"] != result["loss"]
    run, _ = make_run(config)
    running.restore(run, latest(tmp_path / "run"))
    assert evaluate(run)["loss"] == single["loss"]


def test_a_checkpoint_with_other_bases_is_refused(folder, tmp_path):
    run, loaded = make_run(configure(folder, tmp_path / "run"))
    running.save(run, Checkpointer(tmp_path / "run", run.transport, 0, loaded.bundle.base_name))
    other, _ = make_run(configure(folder, tmp_path / "other", lora__start_samples=2))
    with pytest.raises(ValueError, match="has other bases than the run that is to go on from it"):
        running.restore(other, latest(tmp_path / "run"))
    seeded, loaded = make_run(configure(folder, tmp_path / "seeded", lora__start="kaiming"))
    running.save(seeded, Checkpointer(tmp_path / "seeded", seeded.transport, 0, loaded.bundle.base_name))
    with pytest.raises(ValueError, match="lacks the bases of its adapters"):
        bases_of(latest(tmp_path / "seeded"))


class OtherCompany:
    """A transport whose process 0 hosts two peers that start elsewhere."""

    def spread(self, data):
        return bytes(len(data))

    def agree(self, value):
        return value


def test_other_bases_are_refused_before_the_first_round(folder, tmp_path):
    run, loaded = make_run(configure(folder, tmp_path / "run"))
    check_same_start(run.peers, loaded.bundle, run.transport, 4)
    run.peers.ids = [2, 3, 4, 5]
    with pytest.raises(ValueError, match="peer 2 starts from other bases, another core or head than peer 0"):
        check_same_start(run.peers, loaded.bundle, OtherCompany(), 6)


@pytest.mark.parametrize("fields, said", [
    ({"lora__adapter": "lora", "method": "lora"}, "lora.start = 'gradient' is for lora.adapter = 'sb' or 'ravan', got 'lora'; "
                                                "allowed with it: kaiming, pissa, olora"),
    ({"lora__adapter": "dora", "method": "lora"}, "is for lora.adapter = 'sb' or 'ravan', got 'dora'; allowed with it: kaiming"),
    ({"lora__start": "pissa"}, "lora.start = 'pissa' is for lora.adapter = 'lora', got 'sb'; allowed with it: kaiming, gradient"),
    ({"lora__start": "svd"}, "lora.start = 'svd' is not allowed; allowed: kaiming, pissa, olora, gradient"),
    ({"lora__start_samples": 0}, "lora.start_samples = 0 is not allowed; allowed: a whole number from 1"),
    ({"lora__start_step": -1.0}, "lora.start_step = -1.0 is not allowed; allowed: zero or a positive number"),
    ({"lora__start": "kaiming", "lora__start_step": 0.1}, "lora.start_step = 0.1 is the step of lora.start = 'gradient', got")])
def test_what_does_not_fit_is_refused(folder, tmp_path, fields, said):
    with pytest.raises(ValueError) as error:
        check(configure(folder, tmp_path / "run", **fields))
    assert said in str(error.value)


@pytest.mark.parametrize("spoil, said", [(0.0, "is zero; allowed: lora.targets that the loss depends on"),
                                         (float("inf"), "is not finite; allowed: a model and examples with finite losses")])
def test_a_gradient_that_says_nothing_is_refused(folder, tmp_path, spoil, said):
    config = configure(folder, tmp_path / "run")
    runtime, topology = start(config), check(config)
    loaded = load(config, runtime.device)
    with torch.no_grad():
        for parameter in loaded.bundle.model.get_submodule(loaded.bundle.head_modules[0]).parameters():
            parameter.fill_(spoil)
    with pytest.raises(ValueError, match="lora.start = 'gradient': the first gradient of layer 'bert.encoder.layer.0") as error:
        assemble(config, runtime, loaded, topology)
    assert said in str(error.value)
