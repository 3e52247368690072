"""A script's own loop as one peer, alone: what words it takes, what it refuses, what a round trains, what it leaves in a folder."""

import logging

import own_loop
import peft
import pytest
import torch
from own_loop import without_launcher  # noqa: F401

import dfl
from dfl import methods
from dfl.cli import main
from dfl.script import joining
from dfl.script.settings import check, settings
from dfl.store.runs import read_run

# what each needs of a loop, or of a model, that a script does not have
REFUSED = {**dict.fromkeys(("fedex", "fedex_choco", "flora", "carry", "fedhl"), "beside the factors"),
           **{name: "needs lora.adapter" for name in ("fed_sb", "ravan", "hira", "dora")}}


pytestmark = pytest.mark.usefixtures("without_launcher")


def test_gossip_is_public():
    assert "Gossip" in dfl.__all__ and dfl.Gossip.__name__ == "Gossip"


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_runs_in_a_script_or_says_what_it_needs(name):
    """By what it declares, and not by its name: a residual beside the factors, or another adapter than the model has."""
    before, reason = own_loop.factors(own_loop.model()), None
    try:
        net = own_loop.train(4, method=name, topology="complete")[0]
    except ValueError as refusal:
        reason = str(refusal)
    if reason is None:
        assert name not in REFUSED
        assert any(not torch.equal(before[name], value) for name, value in own_loop.factors(net).items())
    else:
        assert "low-rank products beside the factors" in reason or "needs lora.adapter" in reason, reason
        assert REFUSED.get(name, "") in reason and joining.current() is None


def test_a_model_with_dora_trains_its_magnitudes():
    net = own_loop.train(4, net=own_loop.model(use_dora=True), method="dora", topology="complete")[0]
    before = own_loop.factors(own_loop.model(use_dora=True))
    moved = [name for name, value in own_loop.factors(net).items() if not torch.equal(value, before[name])]
    assert any("magnitude" in name for name in moved)


def test_words_are_those_of_a_recipe(tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("method: tad\ntopology: ring\ntrain: {local_steps: 7}\ncodec: int8\n")
    config = settings(recipe, None, {"codec": "none", "method__T": 3}, 1)
    assert (config.train.local_steps, config.codec.name, dict(config.method.params)) == (7, "none", {"T": 3})
    assert config.train.state == "carried"  # the moments are the script's
    assert settings(None, 4, {"train__state": "fresh"}, 1).train.state == "fresh"


@pytest.mark.parametrize(("words", "said"), [
    ({"every": 0}, "every = 0"), ({"every": True}, "every = True"), ({"every": 2, "peers": 8}, "peers = 8"),
    ({"every": 2, "nothing": 1}, "nothing"), ({"every": 2, "method": "tda"}, "tad"),
    ({"every": None, "train__local_epochs": 1}, "every"), ({"every": 2, "delay": 1}, "delay = 1 .*allowed: 0, or dfl train"),
    ({"every": 2, "membership__mode": "survive"}, "membership.mode = 'survive' .*allowed: fixed, or dfl train"),
    ({"every": 2, "train__privacy": {"noise": 1.0, "clip": 1.0}}, "train.privacy.noise = 1.0 .*allowed: null, or dfl train")])
def test_wrong_words_are_refused_with_what_is_allowed(words, said):
    words = dict(words)
    with pytest.raises(ValueError, match=said):
        check(settings(None, words.pop("every"), words, 1))


def test_what_the_script_decides_is_told_and_not_used(caplog):
    with caplog.at_level(logging.WARNING):
        settings({"model": {"name": "minilm"}, "train": {"lr": 0.5, "local_steps": 2}}, None, {"partition": "iid"}, 1)
    assert "partition, model.name, train.lr" in caplog.text and "local_steps" not in caplog.text


def test_a_start_says_what_mixes(tmp_path, capfd):
    """Whoever forgets the launcher would wait for a consensus that never comes."""
    _, _, (state, *_) = own_loop.train(4, 2, method="tad", output=tmp_path / "run", leave_at=2)
    assert capfd.readouterr().err.startswith(
        "dfl: 1 peer, which has nobody to mix with (torchrun --nproc-per-node 4 ... starts four); method tad, rounds of 2 optimiser "
        f"steps; run folder {tmp_path / 'run'}\n")
    own_loop.train(4, 2, first=2, state=state, method="tad")
    assert "no run folder; goes on after 1 rounds\n" in capfd.readouterr().err


def test_a_model_that_no_row_has_a_place_for_is_refused():
    plain = own_loop.Net()
    with pytest.raises(ValueError, match="no LoRA layers"):
        own_loop.train(2, net=plain, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="rank_pattern"):
        own_loop.train(2, net=own_loop.model(rank_pattern={"second": 1}))
    with pytest.raises(ValueError, match="rounds = 0"):
        own_loop.train(2, rounds=0)


def test_deepspeed_and_fsdp_of_version_1_are_refused_before_anybody_is_waited_for():
    net = own_loop.model()
    wrapped = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2",
                                                  "optimizer": own_loop.adamw(net)})
    in_parts, flat = own_loop.model(), own_loop.model()
    next(in_parts.parameters()).ds_id = 0  # as ZeRO 3 numbers them
    next(flat.parameters())._fsdp_flattened = True
    for model, optimizer, said in ((net, wrapped(), "would undo every mix"), (in_parts, own_loop.adamw(net), "would undo every mix"),
                                   (flat, own_loop.adamw(net), "flat buffers of the factors")):
        with pytest.raises(ValueError, match=rf"{said}.*; allowed: data parallel \(DDP\), FSDP2"):
            dfl.Gossip(model, optimizer)
        assert joining.current() is None


def test_the_model_is_the_script_s_alone_again():
    net, optimizer, _ = own_loop.train(4, method="ffa")
    assert all(p.requires_grad for name, p in net.named_parameters() if "lora" in name)
    assert joining.current() is None
    before = own_loop.factors(net)
    own_loop.step(net, optimizer, 0, 9)  # both factors train, and nothing mixes
    assert all(not torch.equal(before[name], value) for name, value in own_loop.factors(net).items())


def test_a_mix_does_not_walk_through_the_model(monkeypatch):
    """It has thousands of modules, and a mix may come behind every step."""
    net, seen = own_loop.model(), []
    optimizer = own_loop.adamw(net)
    with dfl.Gossip(net, optimizer, 1, method="tad") as gossip:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "named_modules", lambda module, *_, **__: seen.append(module) or iter(()))
            for number in range(3):
                own_loop.step(net, optimizer, 0, number)
        assert gossip.rounds == 3 and not seen


def test_what_nobody_records_is_not_measured(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("dfl.run.loop.measure", lambda *_: asked.append(1) or {})
    own_loop.train(6, 1, measure__every=1)
    assert not asked
    own_loop.train(6, 1, measure__every=1, output=tmp_path / "run")
    assert asked


def test_rates_are_those_of_a_state_that_was_loaded():
    net = own_loop.model()
    optimizer = own_loop.adamw(net)
    with dfl.Gossip(net, optimizer, 5) as gossip:
        before = gossip._mixing.row.rates(0)
        optimizer.param_groups[0]["lr"] *= 2
        state = optimizer.state_dict()
        state["param_groups"][0]["lr"] *= 2
        optimizer.load_state_dict(state)
        assert gossip._mixing.row.rates(0) == {name: pytest.approx(4 * rate) for name, rate in before.items()} != {}


def test_a_factor_that_does_not_train_keeps_its_values_whoever_turns_its_gradients_on():
    """A trainer that switches the adapter off for a reference model turns all gradients on again behind it."""
    net, before = own_loop.model(), own_loop.factors(own_loop.model())
    optimizer = own_loop.adamw(net)
    with dfl.Gossip(net, optimizer, 5, method="ffa"):
        for number in range(5):
            for name, parameter in net.named_parameters():
                parameter.requires_grad_("lora" in name)
            own_loop.step(net, optimizer, 0, number)
    for name, value in own_loop.factors(net).items():
        assert torch.equal(value, before[name]) == ("lora_A" in name), name


def test_a_mask_keeps_numbers_and_their_moments():
    net, before = own_loop.model(), own_loop.factors(own_loop.model())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.5)
    with dfl.Gossip(net, optimizer, 4, method="plora") as gossip:
        for number in range(4):
            own_loop.step(net, optimizer, 0, number)
        trained = gossip._mixing.run.gossip.method.schedule.plan(0, 0).mask
    row, old = ([value.flatten() for group in ("lora_A", "lora_B") for name, value in found.items() if group in name]
                for found in (own_loop.factors(net), before))
    row, old = torch.cat(row), torch.cat(old)
    assert torch.equal(row != old, trained) and 0 < trained.sum() < len(row)


def test_what_a_rule_adds_to_gradients_reaches_the_optimiser():
    def one_step(correction: float):
        net = own_loop.model()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        with dfl.Gossip(net, optimizer, 2, method="lora") as gossip:
            heart = gossip._mixing.run.gossip
            added = torch.full((heart.layout.size,), correction)
            heart.method = heart.method._replace(rule=heart.method.rule._replace(correct=lambda state: added))
            own_loop.step(net, optimizer, 0, 0)
        return own_loop.factors(net)

    plain, corrected = one_step(0.0), one_step(3.0)
    for name, value in plain.items():
        torch.testing.assert_close(corrected[name], value - 0.3)


def test_what_a_rule_does_behind_each_step_reaches_the_model():
    """A penalty on the size of numbers, as a step of its own."""
    wrapper = {"name": "flexatc", "penalty": "l1", "strength": 0.5}
    plain, penalised = (own_loop.factors(own_loop.train(6, 2, method="lora", wrapper=given)[0]) for given in ("none", wrapper))
    assert sum(value.abs().sum() for value in penalised.values()) < sum(value.abs().sum() for value in plain.values())


def test_state_belongs_to_a_peer_and_is_loaded_before_the_block():
    state = own_loop.train(5, leave_at=4)[2][0]
    with pytest.raises(ValueError, match="is of peer 3, and this is peer 0"):
        own_loop.train(5, state=state | {"peer": 3})
    with pytest.raises(ValueError, match="version 9"):
        own_loop.train(5, state=state | {"version": 9})
    net = own_loop.model()
    with dfl.Gossip(net, own_loop.adamw(net), 2) as gossip, pytest.raises(ValueError, match="before `with`"):
        gossip.load_state_dict(state)
    with pytest.raises(ValueError, match="inside of its `with` block"):
        gossip.state_dict()


def test_report_and_export_read_the_folder_of_a_script(tmp_path, capsys):
    output = tmp_path / "run"
    net = own_loop.model()
    optimizer = own_loop.adamw(net)
    with dfl.Gossip(net, optimizer, 3, output=output, method="lora", measure={"every": 1}) as gossip:
        gossip.evaluated(loss=2.0)
        for number in range(8):
            loss = own_loop.step(net, optimizer, 0, number)
            gossip.log(loss)
            if number % 3 == 2:
                gossip.evaluated(loss=loss)
        assert main(["watch", str(output), "--once"]) == 0  # while it is at work
        shown = capsys.readouterr().out
        assert "evaluations" in shown and "round 1/?" in shown, shown
    run = read_run(output)
    assert [record["round"] for record in run.records] == [0, 1, 2, 3] and run.finished and not run.problems
    assert run.records[0]["eval"]["perplexity"]["mean"] == pytest.approx(7.389056)
    assert all(record["train_loss"]["mean"] > 0 for record in run.records[1:]) and "measures" in run.records[1]
    for command in ("report", "watch"):
        assert main([command, str(output)]) == 0  # the view ends with a run that has ended
    assert (output / "report.html").is_file()
    saved = peft.PeftModel.from_pretrained(own_loop.Net(), output / "checkpoints/round-00003/consensus")
    for name, value in own_loop.factors(net).items():
        assert torch.equal(saved.get_parameter(name), value), name
    with pytest.raises(ValueError, match="already holds a run"):
        own_loop.train(2, output=output)
    own_loop.train(2, output=output, overwrite=True)
    assert read_run(output).done == 1
