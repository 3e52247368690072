"""A base model on several processes, without any: what is refused, how a batch is divided, masks of a part of it."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import save
from torch import nn

from dfl import config as configuration
from dfl.run.build import check
from dfl.run.dryrun import dry_run
from dfl.run.runtime import Place, of_team
from dfl.training.dropout import Cut, PeerDropout
from dfl.training.sharding import layers_of
from dfl.training.together import part_of

REFUSED = [({"train": {"executor": "stacked"}}, "executor = 'stacked'.*allowed: auto, sequential"),
           ({"train": {"batch_size": 2}}, "train.batch_size = 2 .*allowed: at least 3"),
           ({"train": {"privacy": {"noise": 0.0}}}, "train.privacy.noise .*allowed: null"),
           ({"model": {"quantization": "nf4", "task": "causal_lm"}}, "model.quantization = 'nf4'.*allowed: null"),
           ({"membership": "survive"}, "membership.mode = 'survive'.*allowed: fixed"),
           ({"lora": {"adapter": "sb", "start": "gradient"}, "method": "fed_sb"}, "lora.start = 'gradient'.*allowed: kaiming"),
           ({"eval": {"generate": {"examples": 2}}, "model": {"task": "causal_lm"}}, "eval.generate.examples = 2.*allowed: 0"),
           ({"lora": {"adapter": "hira"}, "method": "hira"}, "lora.adapter = 'hira' multiplies the weights"),
           ({"lora": {"adapter": "orthogonal"}, "method": "task_bank"}, "task_bank.layers = 'spectrum'")]


@pytest.mark.parametrize("fields, said", REFUSED, ids=[said.partition(" ")[0] for _, said in REFUSED])
def test_what_has_no_parts_is_refused_with_the_reason(fields, said):
    check(configuration.from_dict(fields | {"peers": 4}))
    with pytest.raises(ValueError, match=f"processes_per_peer = 3 .*{said}.*processes_per_peer: 1"):
        check(configuration.from_dict(fields | {"peers": 4, "processes_per_peer": 3}))


def test_places_of_teams():
    assert [of_team(Place(rank, 6, rank % 3, 3), 2)[:2] for rank in range(6)] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]
    assert of_team(Place(5, 6, 2, 3), 2)[2:] == (2, 3)
    with pytest.raises(ValueError, match="processes_per_peer = 4 and 6 process.*multiple of 4"):
        of_team(Place(0, 6), 4)


def test_parts_of_a_batch_are_all_of_it_once():
    assert [part_of(rank, 3, 5) for rank in range(3)] == [(0, 2, 5), (2, 2, 5), (4, 1, 5)]
    batch = {"ids": torch.arange(10).view(10, 1), "labels": torch.arange(10), "rate": torch.tensor(0.5), "shape": torch.ones(3)}
    parts = [part_of(rank, 3, 5).of(batch) for rank in range(3)]  # two rows an example
    for key in ("ids", "labels"):
        assert torch.equal(torch.cat([part[key] for part in parts]), batch[key])
    assert all(part["rate"] == 0.5 and len(part["shape"]) == 3 for part in parts)


def test_who_has_no_example_sees_the_first_and_does_not_count():
    part = part_of(2, 3, 2)
    assert not part.counts and part.of({"ids": torch.arange(2)})["ids"].tolist() == [0]


@pytest.mark.parametrize("shape", [(5, 4, 8), (20, 8), (5, 2, 4, 4)])
def test_masks_of_parts_are_those_of_the_whole_batch(shape):
    """Also of inputs whose rows are flattened; the generators end alike."""
    def masks(cut, num_rows):
        generator = torch.Generator().manual_seed(1)
        with PeerDropout([generator], cut):
            return [F.dropout(torch.ones(num_rows, *shape[1:]), 0.5) for _ in range(2)], generator.get_state()

    whole, state = masks(None, shape[0])
    each, parts = shape[0] // 5, [part_of(rank, 2, 5) for rank in range(2)]
    found = [masks(Cut(*part), part.number * each) for part in parts]
    for k in range(2):
        assert torch.equal(torch.cat([one[k] for one, _ in found]), whole[k])
    assert all(torch.equal(other, state) for _, other in found)
    assert not torch.equal(whole[0], whole[1])


def test_layers_are_those_of_the_outermost_lists(tmp_path):
    inner = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)])
    assert layers_of(nn.ModuleDict({"stack": inner, "head": nn.Linear(2, 2)})) == list(inner)


def test_a_dry_run_counts_a_part_of_the_base_model(tmp_path, monkeypatch):
    save(tmp_path / "llama", "llama")
    (tmp_path / "data.csv").write_text("text\n" + "good film\n" * 40)
    fields = {"peers": 2, "model": {"name": str(tmp_path / "llama"), "task": "causal_lm"}, "device": "cpu", "processes": 2,
              "data": {"source": "file", "train": str(tmp_path / "data.csv"), "max_length": 16}, "output": str(tmp_path / "run")}
    whole, parts = (dry_run(configuration.from_dict(fields | {"processes_per_peer": each})) for each in (1, 2))

    def kilobytes(text: str, name: str) -> float:
        (line,) = [line for line in text.splitlines() if name in line]
        return float(line.split()[-2])

    assert kilobytes(parts, "base model, one of 2 parts") == pytest.approx(kilobytes(whole, "base model") / 2, rel=0.01)
