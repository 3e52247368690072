"""delay: 1, exchange while peers train: the limit case, the arithmetic, a stop in the middle, refusals, a run."""

import pytest
import tiny_models
import tiny_runs
import torch
from cases import NUM, Case, start_rows

from dfl.engine import state as trees
from dfl.methods import METHODS, Choice
from dfl.run import train as running
from dfl.store.records import read_lines

REFUSED = {"fed_svd", "flora", "plora", "lora_a2", "salf", "fedex_choco", "task_bank"}
# settings that must do the same whether what they see is from before the local phase or from behind one that does nothing
SLOTS = {"": {}, "int8": {"codec": Choice("int8", {"block": 8})}, "lossy": {"channel": Choice("lossy", {"rate": 0.4})},
         "silent": {"trigger": Choice("event", {"threshold": 0.2, "max_silence": 2})}, "sign": {"codec": Choice("sign")},
         "clipped": {"guard": Choice("clipped")}}


def moved(x, t: int, scale: float = 1.0):
    return scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)


def round_of(heart, x, t: int, scale: float = 1.0) -> None:
    heart.begin(t, x)
    x += moved(x, t, scale)
    heart.arrive()
    heart.round(t, x)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - REFUSED))
@pytest.mark.parametrize("setting", ["", "lossy", "clipped"])
def test_a_local_phase_that_does_nothing_is_the_run_without_delay_to_the_bit(name, setting):
    slots = SLOTS[setting]
    try:
        plain = Case(name, slots=slots)
    except ValueError as error:  # whatever the delay
        with pytest.raises(ValueError, match=str(error)[:40].replace("(", r"\(")):
            Case(name, slots=slots | {"delay": 1})
        return
    ahead, found = Case(name, slots=slots | {"delay": 1}), []
    for case in (plain, ahead):
        x = start_rows(case)
        heart = case.gossip(x)
        for t in range(6):
            heart.begin(t, x)
            heart.round(t, x)
        found.append((x, heart.residuals()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is None or torch.equal(found[0][1], found[1][1])


def test_a_round_is_w_times_the_rows_before_it_and_what_each_has_trained():
    """D-PSGD with the mix beside the gradient step: x(t+1) = W x(t) + steps(t)."""
    case = Case("lora", slots={"delay": 1})
    x = start_rows(case).double()
    w, expected = torch.from_numpy(case.topology.matrix(0)), x.clone()
    heart = case.gossip(x)
    for t in range(5):
        round_of(heart, x, t)
        expected = w @ expected + moved(x, t)
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lora", "decaf", "fedex", "hira"])
@pytest.mark.parametrize("setting", SLOTS)
def test_stopped_while_an_exchange_is_under_way_and_resumed_it_is_never_stopped(name, setting):
    slots = SLOTS[setting] | {"delay": 1}
    try:
        case = Case(name, slots=slots)
    except ValueError:
        case = Case("lora", slots=slots)
    x = start_rows(case)
    heart = case.gossip(x)
    for t in range(6):
        round_of(heart, x, t, 0.1)
    y = start_rows(case)
    first = case.gossip(y)
    for t in range(3):
        round_of(first, y, t, 0.1)
    first.begin(3, y)
    half = moved(y, 3, 0.1)
    half[:, half.shape[1] // 2:] = 0
    y += half
    first.arrive()
    saved = {key: value.clone() for key, value in trees.flatten(first.state).items()}
    assert sum(key.startswith("ahead.") for key in saved) == NUM
    again = case.gossip(start_rows(case))
    again.restore(trees.unflatten(saved))
    again.begin(3, y)
    y += moved(y, 3, 0.1) - half
    again.arrive()
    again.round(3, y)
    for t in range(4, 6):
        round_of(again, y, t, 0.1)
    assert torch.equal(x, y)
    assert not first.memory.tree["ahead"] and not again.state["ahead"]


def test_a_round_that_nobody_has_begun_is_an_error():
    case = Case("lora", slots={"delay": 1})
    x = start_rows(case)
    with pytest.raises(ValueError, match=r"call begin\(t, x\) before the local"):
        case.gossip(x).round(0, x)


@pytest.mark.parametrize("slots, said", [
    ({"wrapper": Choice("gradient_tracking")}, "wrapper.name = 'gradient_tracking' sends what the local phase made"),
    ({"trigger": Choice("efhc", {"r": 0.3, "bandwidth": 1.0})}, "trigger.name = 'efhc' answers what arrives"),
    ({"channel": Choice("delay", {"by": 1})}, "channel.name = 'delay' delays messages itself"),
    ({"channel": Choice("over_the_air")}, "channel.name = 'over_the_air' delivers sums alone"),
    ({"channel": Choice("perfect", {"aggregations": 2})}, "channel.aggregations = 2 has more than one exchange")])
def test_what_cannot_be_begun_before_the_local_phase_is_refused(slots, said):
    Case("lora", slots=slots)
    with pytest.raises(ValueError) as error:
        Case("lora", slots=slots | {"delay": 1})
    assert said in str(error.value) and "allowed: 0, or methods that average" in str(error.value)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_rule_that_cannot_says_why(name):
    why = "its messages mean|its copies have|a change meanwhile"
    with pytest.raises(ValueError, match=f"delay = 1 mixes what was sent before .* cannot have: ({why})"):
        Case(name, slots={"delay": 1})


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    root = tmp_path_factory.mktemp("pieces")
    return tiny_models.save(root / "model", "bert", layers=2), tiny_runs.write_data(root)


def configured(pieces, output, **fields):
    return tiny_runs.make_config(*pieces, output, train__rounds=4, train__lr=1e-2, method="lora", **fields)


def test_a_run_with_a_delay_learns_and_ends_elsewhere(pieces, tmp_path):
    found = {}
    for delay in (0, 1):
        assert running.train(configured(pieces, tmp_path / f"run-{delay}", delay=delay)) == 0
        found[delay] = tiny_runs.adapter_digests(tmp_path / f"run-{delay}")
    assert found[0] != found[1]
    records = read_lines(tmp_path / "run-1" / "metrics.jsonl")
    assert all(record["seconds"]["local"] > 0 and record["message_bytes"] > 0 for record in records[1:])
