"""A script's own loop as several peers: what a mix makes of their factors, resume, peers of unequal length and rank, and failures."""

import own_loop
import pytest
import torch
import torch.distributed as dist
from processes import run_processes

import dfl
from dfl.store.runs import read_run
from dfl.training.base import DivergenceError


def gathered(net) -> list[torch.Tensor]:
    """The factors of all peers as rows, by way of the default group, which is the script's own."""
    mine = torch.cat([value.flatten() for value in own_loop.factors(net).values()])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return rows


def _one_mix(rank: int) -> None:
    net = own_loop.model()
    with torch.no_grad():  # another start: that of peer 0 counts
        for name, parameter in net.named_parameters():
            if "lora" in name and rank:
                parameter.add_(1.0)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    default = dist.group.WORLD
    with dfl.Gossip(net, optimizer, 2, method="lora", topology="complete") as gossip:
        own_loop.step(net, optimizer, rank, 0)
        before = gathered(net)
        x, y = own_loop.batch(rank, 1)
        (net(x) - y).square().mean().backward()
        steps = [p.detach() - 0.1 * p.grad for name, p in net.named_parameters() if "lora" in name]
        expected = torch.cat([value.flatten() for value in steps])
        dist.all_reduce(expected)
        optimizer.step()
        torch.testing.assert_close(gathered(net)[rank], expected / 3, rtol=1e-5, atol=1e-6)
        assert gossip.rounds == 1 and (gossip.rank, gossip.size) == (rank, 3)
        assert gossip.shard(list(range(7))) == list(range(7))[rank::3]
    assert not torch.equal(before[0], before[1]) and dist.group.WORLD is default
    alone = own_loop.model()
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    own_loop.step(alone, optimizer, 0, 0)
    torch.testing.assert_close(before[0], torch.cat([v.flatten() for v in own_loop.factors(alone).values()]), rtol=0, atol=0)


def test_a_mix_is_the_mean_of_what_the_peers_have_trained_from_peer_0_s_start():
    run_processes(_one_mix, 3)


RESUMED = [{"method": "tad", "topology": "ring"}, {"method": "plora", "topology": "ring"},
           {"method": "decaf", "train__at_refactor": "rotate"}, {"method": "lora", "codec": {"name": "top_k", "share": 0.2}},
           {"method": "lora", "trigger": {"name": "event", "threshold": 0.05}}, {"method": "lora", "wrapper": "gradient_tracking"},
           {"method": "lora", "schedule": {"name": "stragglers", "share": 0.5}}]


def _stopped_and_resumed(rank: int, words: dict) -> None:
    whole, _, kept = own_loop.train(11, 3, leave_at=7, **words)
    state, net_state, optimizer_state = kept
    net = own_loop.model()
    net.load_state_dict(net_state)
    optimizer = own_loop.adamw(net)
    optimizer.load_state_dict(optimizer_state)
    net, _, _ = own_loop.train(11, 3, net=net, optimizer=optimizer, first=7, state=state, **words)
    for name, value in own_loop.factors(whole).items():
        assert torch.equal(value, own_loop.factors(net)[name]), (name, words)


def _all_stopped_and_resumed(rank: int) -> None:
    for words in RESUMED:
        _stopped_and_resumed(rank, words)


def test_stopped_inside_of_a_round_and_resumed_ends_in_the_same_bits():
    run_processes(_all_stopped_and_resumed, 2, timeout=150)


def _unequal(rank: int, output: str) -> None:
    net = own_loop.model(r=2 + rank, lora_alpha=4)
    optimizer = own_loop.adamw(net)
    with dfl.Gossip(net, optimizer, 3, method="hetlora", topology="complete", output=output) as gossip:
        for number in range(4 + 5 * rank):
            gossip.log(own_loop.step(net, optimizer, rank, number))


def test_peers_of_unequal_ranks_and_lengths_mix_until_the_last_is_done(tmp_path):
    run_processes(_unequal, 2, str(tmp_path / "run"))
    run = read_run(tmp_path / "run")
    assert run.done == 3 and run.finished and not run.problems
    assert all(len(record["train_loss_peers"]) == 2 for record in run.records)
    assert run.records[-1]["train_loss_peers"][0] is None  # it had ended, and mixed on
    assert run.config["lora"]["rank"] == [2, 3]


def _failing(rank: int) -> str:
    net = own_loop.model()
    optimizer = own_loop.adamw(net)
    try:
        with dfl.Gossip(net, optimizer, 2):
            for number in range(8):
                own_loop.step(net, optimizer, rank, number)
                if rank == 1 and number == 4:
                    raise RuntimeError("the disk of peer 1 is full")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def test_an_error_of_one_peer_ends_the_others_with_its_words():
    said = run_processes(_failing, 3)
    assert said[1] == "RuntimeError: the disk of peer 1 is full"
    assert all("the disk of peer 1 is full" in text and text.startswith("ConnectionError") for text in (said[0], said[2])), said


def _diverging(rank: int) -> None:
    net = own_loop.model()
    optimizer = own_loop.adamw(net)
    with pytest.raises(DivergenceError, match="peer 1 diverged in round 2"), dfl.Gossip(net, optimizer, 2):
        for number in range(8):
            own_loop.step(net, optimizer, rank, number)
            if rank == 1 and number == 2:
                next(p for name, p in net.named_parameters() if "lora" in name).data.fill_(float("nan"))


def test_a_peer_that_diverges_ends_all():
    run_processes(_diverging, 2)


def _differing(rank: int) -> str:
    with pytest.raises(ValueError) as words:
        own_loop.train(4, 2 + rank)
    net = own_loop.model()
    with torch.no_grad():
        net.get_base_model().first.weight.add_(rank)
    with pytest.raises(ValueError) as weights:
        own_loop.train(4, 2, net=net)
    return f"{words.value} | {weights.value}"


def test_peers_with_other_words_or_other_weights_are_refused_by_all():
    for text in run_processes(_differing, 2):
        words, _, weights = text.partition(" | ")
        assert "train.local_steps = 3" in words and "base model" in weights
