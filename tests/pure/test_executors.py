"""One pass for all hosted peers against one peer after the other, dropout per peer, and the order of the examples."""

import json
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfl.adapters.layout import a_view, b_view
from dfl.seeds import derive
from dfl.training import phase
from dfl.training.dropout import PeerDropout
from dfl.training.executors import Sequential, Stacked, choose, logit_bytes
from dfl.training.hosted import HostedPeers
from dfl.training.stream import DataStream

# what dfl.training.executors says of it at import, pytest forgets
pytestmark = pytest.mark.filterwarnings("ignore:grad and param do not obey")
ALL = frozenset({"A", "B", "head"})
CLASSIFY, GENERATE, IMAGES = "sequence_classification", "causal_lm", "image_classification"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Model folders by kind, made when asked for, beside data of unequal and of equal lengths, and images."""
    folder = tmp_path_factory.mktemp("executors")
    tiny_runs.write_data(folder)
    words = tiny_models.WORDS
    equal = [f"{words[k % 21]} {words[k * 5 % 21]} {words[k * 3 % 21]},{'yn'[k % 2]}" for k in range(48)]
    (folder / "equal.csv").write_text("text,label\n" + "\n".join(equal) + "\n")
    return folder


@pytest.fixture(scope="module")
def images(root):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for k in range(16):
        image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{k}.png")
    rows = [json.dumps({"image": f"{k}.png", "label": "ab"[k % 2]}) for k in range(16)]
    (root / "images.jsonl").write_text("\n".join(rows))
    return root / "images.jsonl"


def model(root, kind):
    return root / kind if (root / kind).exists() else tiny_models.save(root / kind, kind, layers=2)


def local_phase(root, kind, executor, *, t=0, rounds=1, trains=ALL, data="data.csv", **fields):
    """Losses (P,), gradients (P, D) and rows (P, D) after the local phases of rounds t, t + 1, ... of peers that differ."""
    fields = {"train__optimizer": "sgd", "train__lr": 0.02, "train__clip": None, "lora__targets": "all-linear",
              "model__dropout": 0.0} | fields
    config = tiny_runs.make_config(model(root, kind), root / data, root / "out", train__executor=executor, **fields)
    run, _ = tiny_runs.make_run(config)
    for row, peer in zip(run.peers.x, run.peers.ids, strict=True):
        row += 0.1 * torch.randn(len(row), generator=torch.Generator().manual_seed(peer))
    for s in range(t, t + rounds):
        plans = tiny_runs.plans(run.peers, trains & frozenset(run.peers.optimizer.params[0]))
        losses = tiny_runs.local_phase(run, s, plans)
    return losses, run.peers.g.clone(), run.peers.x.clone()


def assert_alike(root, kind, *, trains=ALL, tolerance=1e-5, **options):
    reference = local_phase(root, kind, "sequential", trains=trains, **options)
    stacked = local_phase(root, kind, "stacked", trains=trains, **options)
    assert float(reference[1].abs().max()) > 1e-3  # there is something to compare
    for one, other in zip(reference, stacked, strict=True):
        assert float((one - other).abs().max()) < tolerance * float(one.abs().max().clamp_min(1))
    return reference


CASES = [(kind, CLASSIFY, head) for kind in ("bert", "llama", "gpt2") for head in ("frozen", "mixed", "local")]
CASES += [("llama", GENERATE, "frozen"), ("gpt2", GENERATE, "frozen"), ("roberta", CLASSIFY, "mixed"),
          ("distilbert", CLASSIFY, "local"), ("albert", CLASSIFY, "mixed")]


@pytest.mark.long
@pytest.mark.parametrize("kind, task, head", CASES)
def test_one_pass_for_all_gives_the_losses_and_gradients_of_each(root, kind, task, head):
    losses, g, _ = assert_alike(root, kind, model__task=task, lora__head=head)
    assert len(set(losses.tolist())) == 4  # the peers differ: nobody got another's factors


@pytest.mark.parametrize("head", ["frozen", "mixed"])
def test_images_too(root, images, head):
    assert_alike(root, "vit", model__task=IMAGES, data="images.jsonl", lora__head=head, train__batch_size=2)


@pytest.mark.parametrize("trains", [{"A"}, {"B"}, {"A", "head"}])
def test_only_what_a_round_trains_moves(root, trains):
    _, g, x = assert_alike(root, "bert", trains=frozenset(trains), lora__head="mixed")
    before = local_phase(root, "bert", "sequential", lora__head="mixed", train__lr=0.0)[2]
    groups = tiny_runs.make_run(tiny_runs.make_config(model(root, "bert"), root / "data.csv", root / "out", lora__head="mixed",
                                                      lora__targets="all-linear"))[0].peers.layout.groups
    for name, cut in groups.items():
        assert bool((x[:, cut] != before[:, cut]).any()) == (name in trains)


def test_accumulated_micro_batches(root):
    many = assert_alike(root, "bert", train__accumulation=3)
    once = local_phase(root, "bert", "sequential", train__batch_size=12)
    # three micro-batches of four are one batch of twelve: the same examples in the same order
    torch.testing.assert_close(many[2], once[2], rtol=1e-5, atol=1e-5)


def test_clipping_is_per_peer(root):
    _, g, _ = assert_alike(root, "bert", train__clip=0.01)
    norms = g.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((4,), 0.01), rtol=1e-3, atol=0)


def test_adamw_and_several_rounds(root):
    # moments blow rounding up where a gradient is nearly zero
    assert_alike(root, "bert", rounds=3, train__optimizer="adamw", train__lr=1e-3, train__state="carried", train__eps=1e-3,
                 tolerance=1e-4)


SKEWED = {"train__local_steps": None, "train__local_epochs": 1, "train__batch_size": 2,
          "partition": "{name: quantity, skew: 2.0}"}


def test_unequal_numbers_of_local_steps(root):
    config = tiny_runs.make_config(model(root, "bert"), root / "data.csv", root / "out", **SKEWED)
    peers = tiny_runs.make_run(config)[0].peers
    steps = [peers.steps(row) for row in range(4)]
    assert len(set(steps)) >= 3 and min(steps) == 1
    assert_alike(root, "bert", rounds=2, **SKEWED)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_unequal_numbers_of_local_steps_under_a_schedule(root, schedule):
    assert_alike(root, "bert", rounds=2, train__schedule=schedule, train__rounds=2, **SKEWED)


def test_a_batch_larger_than_a_shard(root):
    assert_alike(root, "bert", train__batch_size=20)


DROPOUT = {"data": "equal.csv", "model__dropout": 0.3, "lora__dropout": 0.3}


@pytest.mark.parametrize("kind, task", [("bert", CLASSIFY), ("gpt2", CLASSIFY), ("llama", GENERATE), ("distilbert", CLASSIFY)])
def test_equal_lengths_get_the_same_masks_in_both_executors(root, kind, task):
    with_dropout = assert_alike(root, kind, model__task=task, **DROPOUT)
    without = local_phase(root, kind, "sequential", model__task=task, data="equal.csv")
    assert float((with_dropout[0] - without[0]).abs().max()) > 1e-4  # dropout did act


@pytest.mark.parametrize("executor", [Sequential(), Stacked()])
def test_masks_do_not_depend_on_who_else_is_hosted_nor_on_the_global_generator(root, executor):
    config = tiny_runs.make_config(model(root, "bert"), root / "equal.csv", root / "out", model__dropout=0.3,
                                   lora__dropout=0.3, lora__targets="all-linear", train__lr=0.1)
    run, loaded = tiny_runs.make_run(config)

    def rows(hosted, global_seed):
        torch.manual_seed(global_seed)
        streams = [DataStream(loaded.parts[p], 4, 0, p) for p in hosted]
        peers = HostedPeers(hosted, loaded.adapted, streams, config.train, seed=0, device=torch.device("cpu"))
        for t in range(2):
            tiny_runs.local_phase(run, t, tiny_runs.plans(peers, frozenset({"A", "B"})), executor, peers)
        return dict(zip(hosted, peers.x.clone(), strict=True))

    everybody = rows([0, 1, 2, 3], 1)
    for hosted in ([2], [1, 3], [3, 0]):
        for peer, row in rows(hosted, 2).items():
            if isinstance(executor, Sequential):
                assert torch.equal(row, everybody[peer])
            else:
                torch.testing.assert_close(row, everybody[peer], rtol=1e-4, atol=1e-5)
    assert not torch.equal(everybody[0], everybody[1])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_each_block_of_rows_has_the_mask_of_its_peer():
    x = torch.ones(6, 5)
    with PeerDropout(generators(1, 2, 3)):
        together = nn.functional.dropout(x, 0.5)
    for k, seed in enumerate((1, 2, 3)):
        with PeerDropout(generators(seed)):
            assert torch.equal(nn.functional.dropout(x[:2], 0.5), together[2 * k:2 * k + 2])
    assert set(together.unique().tolist()) == {0.0, 2.0}
    layer = nn.Dropout(0.5).eval()
    with PeerDropout(generators(1)):
        assert torch.equal(layer(x), x) and torch.equal(nn.functional.dropout(x, 0.0), x)


def test_a_transposed_input_gets_the_mask_of_its_shape():
    x = torch.ones(4, 3, 5)
    with PeerDropout(generators(1, 2)):
        plain = nn.functional.dropout(x, 0.5)
    with PeerDropout(generators(1, 2)):
        assert torch.equal(nn.functional.dropout(torch.ones(5, 3, 4).transpose(0, 2), 0.5), plain)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}])
def test_written_out_attention_is_the_kernel(options):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    options = dict(options)
    kind = options.pop("mask", None)
    if kind:
        allowed = torch.rand(2, 1, 6, 6) > 0.3
        allowed |= torch.eye(6, dtype=torch.bool)
        options["attn_mask"] = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
    with PeerDropout(generators(1)):  # so small a probability that no element is dropped
        ours = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, **options)
    torch.testing.assert_close(ours, nn.functional.scaled_dot_product_attention(q, k, v, **options), rtol=1e-5, atol=1e-6)


def test_written_out_attention_with_grouped_heads():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 2, 6, 8)
    with PeerDropout(generators(1)):
        ours = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, enable_gqa=True)
    torch.testing.assert_close(ours, nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=1e-5, atol=1e-6)


def test_an_input_that_does_not_lead_with_the_batch_is_refused_rather_than_split(root):
    config = tiny_runs.make_config(model(root, "bert"), root / "data.csv", root / "out", train__executor="stacked")
    run, loaded = tiny_runs.make_run(config)
    site = loaded.adapted.sites[0].module
    with run.executor.bound(loaded.adapted, run.rows(), None, range(4)) as forward:
        forward({"input_ids": torch.ones(8, 4, dtype=torch.long)}, list(range(4)))
        with pytest.raises(ValueError, match="stacked.*does not lead with the batch of 8"):
            site(torch.ones(1, 8, 16))


class Passes(TorchDispatchMode):
    """The operations whose output has so many numbers."""

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers, self.found = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numbers and not func.is_view:
            self.found.append(func.name())
        return out


@pytest.mark.parametrize("scale", [None, (1.0, 0.5, 1.0, 0.3)])
def test_scaling_and_sum_take_no_pass_of_their_own(root, scale):
    config = tiny_runs.make_config(model(root, "bert"), root / "data.csv", root / "out", train__executor="stacked", lora__alpha=3)
    run, loaded = tiny_runs.make_run(config)
    site, rows = loaded.adapted.sites[0], run.rows()._replace(scale=scale)
    rows.x.copy_(torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(8, 5, site.pair.d_in, generator=torch.Generator().manual_seed(1))
    with run.executor.bound(loaded.adapted, rows, None, range(4)):
        site.module.forward.args[-1].batch = 8
        with Passes(8 * 5 * site.pair.d_out) as passes:
            found = site.module(x)
    base = site.module.base_layer(x)
    for peer in range(4):
        a, b, mine = a_view(rows.x, site.pair)[peer], b_view(rows.x, site.pair)[peer], slice(2 * peer, 2 * peer + 2)
        expected = base[mine] + site.pair.scaling * (scale or [1.0] * 4)[peer] * x[mine] @ a.T @ b.T
        torch.testing.assert_close(found[mine], expected, rtol=1e-5, atol=1e-5)
    assert passes.found == ["aten::addmm", "aten::baddbmm"], passes.found


def test_the_model_is_its_own_again_after_a_stacked_pass(root):
    config = tiny_runs.make_config(model(root, "bert"), root / "data.csv", root / "out", train__executor="stacked",
                                   lora__head="mixed")
    run, loaded = tiny_runs.make_run(config)
    with pytest.raises(RuntimeError, match="stop"):
        with run.executor.bound(loaded.adapted, run.rows(), run.peers.g, range(4), ALL):
            raise RuntimeError("stop")
    assert not any("forward" in vars(m) for m in loaded.adapted.model.modules())


def test_a_head_that_is_not_linear_cannot_be_trained_stacked(root):
    config = tiny_runs.make_config(model(root, "bert"), root / "data.csv", root / "out", lora__head="mixed")
    run, loaded = tiny_runs.make_run(config)
    place = loaded.adapted.head[0]._replace(module=nn.LayerNorm(2))
    adapted = loaded.adapted._replace(head=(place,))
    with pytest.raises(ValueError, match="'stacked' cannot train a LayerNorm"):
        with Stacked().bound(adapted, run.rows(), run.peers.g, range(4), ALL):
            pass


def test_auto_is_sequential_on_a_cpu_and_stacked_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert isinstance(choose("auto", torch.device("cpu")), Sequential)
    assert isinstance(choose("auto", torch.device("cuda")), Stacked)
    assert isinstance(choose("stacked", torch.device("cpu")), Stacked)


@pytest.mark.parametrize("size, batch", [(10, 4), (7, 7), (3, 8), (1, 2), (12, 4)])
def test_every_pass_over_a_shard_has_each_example_once(size, batch):
    indices = np.arange(100, 100 + size)
    stream = DataStream(indices, batch, seed=3, peer=2)
    flat = np.concatenate([stream.batch(number) for number in range(6 * size)])[:6 * size]
    passes = flat.reshape(6, size)
    assert all(sorted(one) == indices.tolist() for one in passes)
    if size > 5:
        assert len({tuple(one) for one in passes}) == 6  # each in an order of its own
    assert stream.batches_per_epoch == -(-size // batch)


def test_a_batch_is_a_function_of_its_number():
    indices = np.arange(10)
    forward, backward = ({n: DataStream(indices, 4, 0, 1).batch(n).tolist() for n in range(12)}, {})
    stream = DataStream(indices, 4, 0, 1)
    for number in reversed(range(12)):
        backward[number] = stream.batch(number).tolist()
    assert forward == backward
    assert forward != {n: DataStream(indices, 4, 0, 2).batch(n).tolist() for n in range(12)}
    assert forward != {n: DataStream(indices, 4, 1, 1).batch(n).tolist() for n in range(12)}


def test_seeds_by_name_do_not_collide():
    seeds = {derive(seed, name, peer, t) for seed in range(3) for name in ("local", "data") for peer in range(12) for t in range(12)}
    assert len(seeds) == 3 * 2 * 12 * 12 and all(0 <= s < 2**63 for s in seeds)


def test_the_global_generator_is_seeded_as_torch_does_and_cheaper(monkeypatch):
    """torch.manual_seed also leaves a seed, and a trace of its caller, for every kind of device that is not there."""
    torch.manual_seed(7)
    wanted = torch.rand(3)
    monkeypatch.setattr(traceback, "format_stack", lambda *given: pytest.fail("a stack was formatted"))
    phase._seed_global(7, torch.device("cpu"))
    assert torch.equal(torch.rand(3), wanted)


def test_outputs_over_a_vocabulary_go_in_passes_that_fit(root):
    """Four peers of which three would be too many for one pass: the same training and evaluation as one after the other."""
    fields = {"model__task": GENERATE, "lora__targets": "all-linear", "model__dropout": 0.0, "train__optimizer": "sgd",
              "train__lr": 0.5, "train__executor": "stacked"}
    config = tiny_runs.make_config(model(root, "llama"), root / "data.csv", root / "out", **fields)
    run, _ = tiny_runs.make_run(config)
    row = logit_bytes(run.peers.adapted.model, config.train.batch_size * config.data.max_length)
    assert row == 4 * 16 * 64 * 12 == run.trainer.row_bytes
    small = Stacked(room=3 * row - 1)
    assert small.groups(4, row) == [[0, 1], [2, 3]] and small.groups(4) == [[0, 1, 2, 3]] and small.groups(0, row) == []
    assert Stacked(room=1).groups(2, row) == [[0], [1]] and Stacked(room=4 * row).groups(5, row) == [[0, 1], [2, 3, 4]]
    found = {}
    for executor in (Sequential(), small):
        run, _ = tiny_runs.make_run(config)
        run.executor, seen = executor, []
        forward = run.peers.adapted.model.forward
        run.peers.adapted.model.forward = lambda *a, seen=seen, forward=forward, **k: (
            seen.append(len(k["input_ids"])), forward(*a, **k))[1]
        losses = run.trainer.run(run.peers.x, run.gossip.plans(0), [None] * 4, 0)
        assert set(seen) == {8 if executor is small else 4}
        found[executor] = [losses, run.peers.x, run.evaluator.sums(run.rows(), executor)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_without_words_at_its_end_has_no_such_output(root):
    run, _ = tiny_runs.make_run(tiny_runs.make_config(model(root, "bert"), root / "data.csv", root / "out"))
    assert logit_bytes(run.peers.adapted.model, 100) == 0 == run.trainer.row_bytes
