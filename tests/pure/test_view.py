"""Members of a run that goes on without those it loses: agreement over histories of losses, cuts and returns, without processes."""

import random

import pytest

from dfl.transport.view import Accusation, Known, Member, Settling, of_one_run


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


def test_a_liar_that_comes_back_takes_nobody_along_who_finds_it_out_again():
    """1 has put it out before, was accused by it, and sees it answer: with 2 alone it has nothing but that."""
    one, two, again = Member(1), Member(2), Member(2, 1)
    known = Known().with_joined(Member(0), one, two).accuse(one, two).accuse(two, one).answered(one).answered(two)
    assert known.members() == (Member(0), one)
    known = known.settled().with_joined(again).accuse(one, again).accuse(again, one).answered(one).answered(again)
    assert known.members() == (Member(0), one)


def test_who_was_left_out_comes_back_as_another_member_only():
    known = accusing(a_group(3), (1, 0)).settled()
    assert numbers(known.answered(Member(0))) == [1, 2]  # too late
    again = known.with_joined(Member(0, 1))
    assert again.members() == (Member(0, 1), Member(1), Member(2))
    assert numbers(accusing(again, (1, 0))) == [0, 1, 2]  # of the one before


def test_what_is_told_does_not_grow_with_the_hours_and_the_members_stay_the_same():
    rng = random.Random(0)
    known = whole = Known().with_joined(*(Member(process) for process in range(8)))
    sizes = []
    for _ in range(300):  # one is not heard for a while by all others, answers or does not, and comes back as another
        there = whole.members()
        gone = rng.choice(there)
        said = [Accusation(one, gone) for one in there if one != gone]
        said += [Accusation(gone, one) for one in there if one != gone and rng.random() < 0.5]
        answers = [one for one in said if rng.random() < 0.7]
        more = Known(accused=frozenset(said), denied=frozenset(answers))
        known, whole = known.join(more), Known(*(one | other for one, other in zip(whole, more, strict=True)))
        assert known.members() == whole.members()
        known, out = known.settled(), whole.out | (whole.joined - set(whole.members()))
        back = [Member(one.process, one.start + 1) for one in whole.latest() & out]
        known, whole = known.with_joined(*back), whole._replace(out=out).with_joined(*back)
        assert known.members() == whole.members()
        sizes.append(len(known.accused) + len(known.denied))
    assert len(whole.accused) > 2000 and max(sizes[100:]) <= 1.5 * max(sizes[:100])


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
        self.under_way: list[tuple[int, int, Member, Known, bool]] = []  # the last: it is settling, and told of itself
        self.settled: dict[int, Known] = {}
        self.views: set[int] = set()  # those that have been members
        self.answered: dict[tuple[int, Member], Known] = {}
        self.again: dict[int, Known] = {}
        for process in self.at:
            self.tell(process)

    def alive(self) -> list[int]:
        return sorted(set(self.at) - self.dead)

    def tell(self, process: int) -> None:
        one = self.at[process]
        self.settled.pop(process, None)
        for q in range(self.size):
            if q != process and (process, q) not in self.cut:
                self.under_way.append((process, q, one.me, one.known, True))

    def deliver(self) -> None:
        """One message of a random link, in the order of that link."""
        links = sorted({(a, b) for a, b, *_ in self.under_way})
        a, b = self.rng.choice(links)
        k = next(k for k, one in enumerate(self.under_way) if one[:2] == (a, b))
        _, _, sender, known, settling = self.under_way.pop(k)
        if b in self.dead:
            return
        verdict = self.at[b].verdict(sender, known) if b in self.views else "learn"
        if verdict == "leave":
            self.dead.add(b)
        elif verdict == "accuse":
            if self.at[b].learn(Known().accuse(self.at[b].me, sender)):
                self.tell(b)
        elif verdict == "tell" or sender in self.at[b].known.out:
            if self.answered.get((b, sender)) != self.at[b].known:
                self.answered[b, sender] = self.at[b].known
                self.under_way.append((b, a, self.at[b].me, self.at[b].known, b not in self.settled))
        elif self.at[b].receive(sender, known):
            self.tell(b)
        elif b in self.settled and settling and self.answered.get((b, sender)) != self.settled[b]:
            self.answered[b, sender] = self.settled[b]  # it has missed the last word
            self.under_way += [(b, a, self.at[b].me, known, False) for known in (self.settled[b], self.settled[b].settled())]
        self.settle(b)

    def settle(self, process: int) -> None:
        one = self.at[process]
        if process not in self.settled and one.me in one.known.members() and not one.waits_for():
            self.settled[process] = one.known
            self.views.add(process)
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
            self.views.discard(process)
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
            for process in () if self.under_way else set(self.alive()) - set(self.settled):
                if self.again.get(process) != self.at[process].known:  # who waits tells again
                    self.again[process] = self.at[process].known
                    self.tell(process)
            if not self.under_way:
                return
        raise AssertionError("no end")


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 10))])
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


class Split(Network):
    """All are cut into groups that go on without each other, for as long as it takes or less; then nothing is cut any more, and who
    ended as another run went before its own is started again, and asks everybody."""

    def split(self) -> None:
        groups = [self.rng.randint(0, 1) for _ in range(self.size)]
        self.cut = {(a, b) for a in range(self.size) for b in range(self.size) if groups[a] != groups[b]}
        self.under_way = [one for one in self.under_way if one[:2] not in self.cut]
        for _ in range(self.rng.choice([0, 3, 10, 1000])):
            if self.rng.random() < 0.3 or not self.under_way:
                self.notice()
            if self.under_way:
                self.deliver()
        self.cut = set()

    def mend(self) -> None:
        """Until all are one run again: everybody tells all now and then, and who has gone comes back."""
        for _ in range(60):
            for process in self.alive():
                known = self.at[process].known
                for q in range(self.size):
                    if q != process and q not in self.dead:
                        self.under_way.append((process, q, self.at[process].me, known, process not in self.settled))
            self.quieten()
            out = [p for p in self.alive() if self.at[p].me not in self.at[p].known.members()]
            self.dead |= set(out)
            if self.dead:
                self.come_back(self.rng.choice(sorted(self.dead)))
            elif len({one.known.members() for one in self.at.values()}) == 1:
                return
        raise AssertionError("they do not come together")

    def come_back(self, process: int) -> None:
        self.dead.discard(process)
        self.under_way = [one for one in self.under_way if process not in one[:2]]
        heard = [(self.at[q].me, self.at[q].known) for q in self.alive() if q != process]
        starts = [member.start for _, known in heard for member in known.joined if member.process == process]
        self.starts[process] = 1 + max([self.starts[process], *starts])
        me = Member(process, self.starts[process])
        self.at[process] = Settling(me, of_one_run(heard).with_joined(me))
        self.views.discard(process)
        self.tell(process)


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 4))])
def test_runs_that_went_on_without_each_other_become_one_and_the_larger_goes_on(block):
    for seed in range(500 * block, 500 * (block + 1)):
        network = Split(seed)
        network.quieten()
        network.split()
        alive = network.alive()
        known = {network.at[p].me: network.at[p].known for p in alive}
        parts = {tuple(m.process for m in one.members()) for me, one in known.items() if me in one.members()}
        settled = all(p in network.settled for p in alive)
        network.mend()
        assert all(network.at[p].known.members() == network.at[0].known.members() for p in range(network.size)), seed
        assert len(network.at[0].known.members()) == network.size, seed
        if settled and len(parts) == 2:
            stays = min(parts, key=lambda part: (-len(part), part))
            assert all(network.starts[p] == 0 for p in stays), (seed, parts, network.starts)
