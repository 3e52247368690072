"""Rules with a state of their own in the real loop: a run that was resumed ends in the bits of one that was not."""

import json

import pytest
import tiny_models
import tiny_runs

from dfl.run import train as running

RULES = {"fedask": "{name: fedask, steps: 2, memory: true}",
         "florist": "{name: florist, tau: 0.8}", "fedrot": "{name: fedrot, side: sender}",
         "flora_na": "{name: flora_na, form: delta}", "hetlora": "{name: hetlora, gamma: 0.5}", "fed_svd": "fed_svd",
         "lora_a2": "{name: lora_a2, keep: 0.5}", "plora": "{name: plora, slots: [1, 2, 1, 1]}"}

CODECS = {"florist": "bfloat16", "plora": "float16"}  # what a codec draws follows from seed, peer and round


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    return tiny_models.save(folder / "bert", "bert", layers=1), tiny_runs.write_data(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", RULES)
def test_a_resumed_run_ends_in_the_same_bits(root, tmp_path, name):
    def config(folder, rounds):
        return tiny_runs.make_config(*root, tmp_path / folder, method=RULES[name], train__lr=0.05, train__rounds=rounds, eval__every=0,
                                     train__state="carried", codec=CODECS.get(name, "none"),
                                     topology="{name: edge_activation, p: 0.5}")
    assert running.train(config("whole", 5)) == 0
    assert running.train(config("halves", 3)) == 0
    assert running.train(config("halves", 5), resume=True) == 0
    assert tiny_runs.adapter_digests(tmp_path / "whole") == tiny_runs.adapter_digests(tmp_path / "halves")
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    told = {"fedask": "truncation_error", "florist": "rank", "flora_na": "relative_error", "hetlora": "rank"}.get(name, "train_loss")
    assert told in last
