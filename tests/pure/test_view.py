"""Members of a run that goes on without those it loses: agreement over histories of losses, cuts and returns, without processes."""

import random

import pytest

from dfl.transport.view import Known, Member, Settling


def a_group(size: int) -> Known:
    return Known().with_joined(*(Member(process) for process in range(size)))


def accusing(known: Known, *pairs: tuple[int, int]) -> Known:
    for by, of in pairs:
        known = known.accuse(Member(by), Member(of))
    return known


def numbers(known: Known) -> list[int]:
    return [member.process for member in known.members()]


def test_who_is_accused_and_does_not_answer_has_gone():
    assert numbers(accusing(a_group(3), (1, 0))) == [1, 2]
    assert numbers(accusing(a_group(4), (3, 0), (3, 1), (3, 2))) == [3]  # the last one there
    assert numbers(accusing(a_group(2), (1, 0))) == [1]


def test_of_two_that_cannot_hear_each_other_one_stays_the_same_for_all():
    known = accusing(a_group(3), (0, 2)).answered(Member(2))
    assert numbers(known) == [0, 1]  # the accused goes
    known = accusing(a_group(3), (0, 2), (2, 0)).answered(Member(2)).answered(Member(0))
    assert numbers(known) == [0, 1]


def test_who_hears_nobody_goes_and_not_all_others():
    known = accusing(a_group(5), (0, 1), (0, 2), (0, 3), (0, 4))
    for process in range(1, 5):
        known = known.answered(Member(process))
    assert numbers(known) == [1, 2, 3, 4]


def test_a_liar_costs_one_member_and_no_second():
    known = accusing(a_group(5), (4, 1)).answered(Member(1)).settled()
    assert numbers(known) == [0, 2, 3, 4]
    known = accusing(known, (4, 2)).answered(Member(2))
    assert numbers(known) == [0, 2, 3]


def test_who_was_left_out_comes_back_as_another_member_only():
    known = accusing(a_group(3), (1, 0)).settled()
    assert numbers(known.answered(Member(0))) == [1, 2]  # too late
    again = known.with_joined(Member(0, 1))
    assert again.members() == (Member(0, 1), Member(1), Member(2))
    assert numbers(accusing(again, (1, 0))) == [0, 1, 2]  # of the one before


@pytest.mark.parametrize("tree", [None, {}, [], [[], [], []], [[[0, 0, 0]], [], [], []], [[[9, 0]], [], [], []],
                                  [[[0, -1]], [], [], []],
                                  [[["0", 0]], [], [], []], [[], [[0, 1]], [], []], [[], [], [], 5], [[[True, 0]], [], [], []]])
def test_what_is_nothing_that_a_member_tells_is_refused(tree):
    with pytest.raises(ValueError, match="member|accusation"):
        Known.read(tree, 4)


def test_what_is_told_is_read():
    import json
    known = accusing(a_group(3), (1, 0), (2, 1)).answered(Member(1)).settled().with_joined(Member(0, 1))
    assert Known.read(json.loads(known.text()), 3) == known
    with pytest.raises(ValueError, match="100002 entries"):
        Known.read([[[0, k] for k in range(100_002)], [], [], []], 3)


class Network:
    """Processes that settle over links that delay and reorder between pairs, may be cut in one direction, and break when one dies."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.size = self.rng.randint(2, 6)
        start = a_group(self.size)
        self.at = {process: Settling(Member(process), start) for process in range(self.size)}
        self.starts = dict.fromkeys(range(self.size), 0)
        self.dead: set[int] = set()
        self.cut: set[tuple[int, int]] = set()
        self.ever_cut = False
        self.under_way: list[tuple[int, int, Member, Known]] = []
        self.settled: dict[int, Known] = {}
        for process in self.at:
            self.tell(process)

    def alive(self) -> list[int]:
        return sorted(set(self.at) - self.dead)

    def tell(self, process: int) -> None:
        one = self.at[process]
        self.settled.pop(process, None)
        for q in range(self.size):
            if q != process and (process, q) not in self.cut:
                self.under_way.append((process, q, one.me, one.known))

    def deliver(self) -> None:
        """One message of a random link, in the order of that link."""
        links = sorted({(a, b) for a, b, *_ in self.under_way})
        a, b = self.rng.choice(links)
        k = next(k for k, one in enumerate(self.under_way) if one[:2] == (a, b))
        _, _, sender, known = self.under_way.pop(k)
        if b in self.dead:
            return
        if self.at[b].receive(sender, known):
            self.tell(b)
        self.settle(b)

    def settle(self, process: int) -> None:
        one = self.at[process]
        if process not in self.settled and one.me in one.known.members() and not one.waits_for():
            self.settled[process] = one.known
            one.known = one.known.settled()

    def happen(self) -> None:
        what = self.rng.choice(["kill", "cut", "return", "several"])
        alive = self.alive()
        if what in ("kill", "several") and len(alive) > 1:
            for process in self.rng.sample(alive, self.rng.randint(1, len(alive) - 1) if what == "several" else 1):
                self.dead.add(process)
        elif what == "cut" and len(alive) > 1:
            self.ever_cut = True
            self.cut.add(tuple(self.rng.sample(alive, 2)))
        elif what == "return" and self.dead and alive:
            process, asked = self.rng.choice(sorted(self.dead)), self.rng.choice(alive)
            self.dead.discard(process)
            self.cut = {pair for pair in self.cut if process not in pair}
            self.under_way = [one for one in self.under_way if process not in one[:2]]
            known = [member.start for member in self.at[asked].known.joined if member.process == process]
            self.starts[process] = 1 + max(self.starts[process], *known)
            me = Member(process, self.starts[process])
            self.at[process] = Settling(me, self.at[asked].known.with_joined(me))
            self.tell(process)

    def notice(self) -> None:
        """Everybody accuses the members that it cannot hear."""
        for process in self.alive():
            one = self.at[process]
            for member in one.known.members():
                cut = (member.process, process) in self.cut
                deaf = member.process in self.dead or cut or self.starts[member.process] != member.start
                if member != one.me and deaf and one.learn(Known().accuse(one.me, member)):
                    self.tell(process)
            self.settle(process)

    def quieten(self) -> None:
        for _ in range(200):
            while self.under_way:
                self.deliver()
            self.notice()
            if not self.under_way:
                return
        raise AssertionError("no end")


@pytest.mark.parametrize("block", range(10))
def test_histories_of_losses_cuts_and_returns_end_in_agreement(block):
    for seed in range(1000 * block, 1000 * (block + 1)):
        network = Network(seed)
        for _ in range(network.rng.randint(1, 4)):
            network.happen()
            for _ in range(network.rng.randint(0, 12)):
                if network.under_way:
                    network.deliver()
            if network.rng.random() < 0.7:
                network.notice()
        network.quieten()
        check(network, seed)


def check(network: Network, seed: int) -> None:
    for process in network.alive():
        one = network.at[process]
        if one.me not in one.known.members():
            continue  # left out: it has to join again
        assert process in network.settled, (seed, process)
        members = one.known.members()
        assert not any(member.process in network.dead for member in members), (seed, process, members)
        for member in members:  # the same at both ends of every edge, and each hears the other
            assert network.at[member.process].known.members() == members, (seed, process, member)
            assert member == one.me or (member.process, process) not in network.cut, (seed, process, member)
    if not network.ever_cut:  # then nobody is left out that lives
        assert all(network.at[p].me in network.at[p].known.members() for p in network.alive()), seed
