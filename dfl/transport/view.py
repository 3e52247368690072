"""Who is in a run that goes on without those it loses: what a process knows of that, and the members that follow from it.

Everything known only grows (Shapiro et al. 2011, conflict-free replicated sets): who has joined, who accuses whom of being gone or
broken, which accused have answered, and who was left out of a settled view. What two processes know is put together by union, and the
members are a function of it alone: processes that know the same agree, in whatever order messages came, and nobody decides for others.

Pure: no clock, no connection (members.py has both).
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

# more entries than that are nothing that a run makes, but a message that is meant to fill memory
MOST_ENTRIES = 100_000


class Member(NamedTuple):
    """A start of a process: one that comes back is another member, with a higher `start`."""

    process: int
    start: int = 0


class Accusation(NamedTuple):
    by: Member
    of: Member


class Known(NamedTuple):
    """joined: all starts of processes that there were. accused: who says of whom that it is gone. denied: those that the accused has
    answered, so that it lives and at most the way between the two is broken. out: left out for good."""

    joined: frozenset[Member] = frozenset()
    accused: frozenset[Accusation] = frozenset()
    denied: frozenset[Accusation] = frozenset()
    out: frozenset[Member] = frozenset()

    def join(self, other: "Known") -> "Known":
        return Known(self.joined | other.joined, self.accused | other.accused, self.denied | other.denied,
                     self.out | other.out)._that_counts()

    def _that_counts(self) -> "Known":
        """Without accusations that change nothing any more, as who is out stays out: those with an end that is out, and, of those that
        were answered, which count against a member for as long as it is one, those with both. The members are the same, and it does
        not matter in which order what processes know is put together; but what is told does not grow with the hours."""
        denied = frozenset(one for one in self.denied if one.by not in self.out or one.of not in self.out)
        accused = frozenset(one for one in self.accused if one in denied or one.by not in self.out and one.of not in self.out)
        return self._replace(accused=accused, denied=denied)

    def with_joined(self, *members: Member) -> "Known":
        return self._replace(joined=self.joined | set(members))

    def accuse(self, by: Member, of: Member) -> "Known":
        return self._replace(accused=self.accused | {Accusation(by, of)})

    def answered(self, me: Member) -> "Known":
        """With an answer of `me` to all that accuse it."""
        return self._replace(denied=self.denied | {one for one in self.accused if one.of == me})

    def latest(self) -> set[Member]:
        """The last start of each process."""
        found: dict[int, Member] = {}
        for member in sorted(self.joined):
            found[member.process] = member
        return set(found.values())

    @functools.lru_cache(maxsize=64)  # noqa: B019 - asked for again and again, of the few that are known at a time
    def members(self) -> tuple[Member, ...]:
        """By process: all that joined, without those that are out, that are accused and have not answered, and without one end of
        every accusation that was answered: of two that cannot hear each other only one can stay, as W has to be the same at both."""
        there = self.latest() - self.out
        there -= {one.of for one in self.accused - self.denied if one.by not in self.out}
        return tuple(sorted(there - self._cover(there)))

    def _cover(self, there: set[Member]) -> set[Member]:
        """One end of every answered accusation among those that are there: first who has such with most processes (one that hears
        nobody goes, not all others), then who is accused by most, then the higher number. An accusation of a second process that was
        answered counts against who makes it, also when the first one's victim has gone; of another start of the same one it does not,
        or a liar that comes back would take those along who find it out again."""
        left, dropped = set(self.denied), set[Member]()
        while open_ones := [one for one in left if one.by in there - dropped and one.of in there - dropped]:
            ends = {end for one in open_ones for end in one}

            def weight(member: Member) -> tuple[int, int, Member]:
                others = {end.process for one in self.denied if member in one for end in one} - {member.process}
                return (len(others), sum(member == one.of for one in open_ones), member)

            dropped.add(max(ends, key=weight))
        return dropped

    def settled(self) -> "Known":
        """The same once its members have agreed on it: whoever is no member now must join again."""
        return self._replace(out=self.out | (self.joined - set(self.members())))._that_counts()

    def goes_before(self, others: Iterable[Member]) -> bool:
        """Whether its members are those that go on, of two runs that go on without each other: those that are more, or else those
        with the lowest process."""
        return _place(self.members()) <= _place(tuple(others))

    def digest(self) -> bytes:
        """8 bytes that are the same where the same is known."""
        return hashlib.sha256(self.text().encode()).digest()[:8]

    @functools.lru_cache(maxsize=16)  # noqa: B019 - told to all others
    def text(self) -> str:
        return json.dumps([sorted(part) for part in self], separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def parse(text: str, size: int) -> "Known":
        """From what `text` gives, which many tell alike. ValueError for what is none, of processes 0 to size - 1."""
        return Known.read(json.loads(text), size)

    @classmethod
    def read(cls, tree: object, size: int) -> "Known":
        """From what `text` gives, loaded. ValueError for what is none, of processes 0 to size - 1."""
        if not isinstance(tree, list) or len(tree) != 4 or not all(isinstance(part, list) for part in tree):
            raise ValueError("what is known of members has four lists")
        if sum(map(len, tree)) > MOST_ENTRIES:
            raise ValueError(f"what is known of members has {sum(map(len, tree))} entries; allowed: {MOST_ENTRIES}")
        joined, accused, denied, out = tree
        return cls(_members(joined, size), _accusations(accused, size), _accusations(denied, size), _members(out, size))


def _place(members: tuple[Member, ...]) -> tuple[int, int]:
    """Of a run among those that go on without each other; the least goes before all others."""
    return -len(members), min((member.process for member in members), default=2**31)


def of_one_run(heard: Iterable[tuple[Member, Known]]) -> Known:
    """What those know who belong to one run: the one that goes before all others, where some go on without each other."""
    first, *rest = sorted(heard, key=lambda one: _place(one[1].members())) or [(Member(0), Known())]
    found = first[1]
    for sender, known in rest:
        if sender not in found.out and first[0] not in known.out:
            found = found.join(known)
    return found


def _member(value: object, size: int) -> Member:
    if not isinstance(value, list) or len(value) != 2 or not all(type(number) is int for number in value):
        raise ValueError(f"a member is a process and its start, got {str(value)[:80]}")
    if not 0 <= value[0] < size or not 0 <= value[1] < 2**31:
        raise ValueError(f"member {value}: allowed are processes 0 to {size - 1}")
    return Member(*value)


def _members(values: Iterable[object], size: int) -> frozenset[Member]:
    return frozenset(_member(value, size) for value in values)


def _accusations(values: Iterable[object], size: int) -> frozenset[Accusation]:
    found = set()
    for value in values:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"an accusation has two members, got {str(value)[:80]}")
        found.add(Accusation(_member(value[0], size), _member(value[1], size)))
    return frozenset(found)


class Settling:
    """How one process comes to agree with the others on what is known, and so on the members: it tells all of them whenever it knows
    more, and has agreed when every member has told it exactly what it knows itself. No round, no leader, and no last message that may
    be lost: who learns more later tells it, and all agree again.

    info: beside it, what each tells of itself (how far it is), which does not change until they have agreed; None: it is still at
    work, and what it tells is not its last word.
    """

    def __init__(self, me: Member, known: Known, info: object = ()):
        self.me, self.known, self.info = me, known, info
        self._told: dict[Member, tuple[Known, object]] = {}

    def verdict(self, sender: Member, known: Known) -> str:
        """What a member of a settled run does about that which a process tells: "learn" it; "tell" the sender, which has missed
        something; "accuse" it, as it goes on without this process and others, but not these without it; or "leave", as its run
        goes before this one (`Known.goes_before`): two that have both settled without the other are never put together, or each
        would put out all of the other."""
        theirs, without_me = known.members(), self.me in known.out
        if sender in self.known.out:
            return "leave" if without_me and not self.known.goes_before(theirs) else "tell"
        if without_me and self.me in self.known.members():
            rest = self.known._replace(out=self.known.out | set(theirs))
            return "accuse" if rest.goes_before(theirs) else "learn"
        return "learn"

    def receive(self, sender: Member, known: Known, info: object = ()) -> bool:
        """What a process tells; whether more is known now, which has to be told to all others."""
        before, self.known = self.known, self.known.join(known).answered(self.me)
        self._told[sender] = known, info
        return self.known != before

    def learn(self, known: Known) -> bool:
        """What this process has seen itself."""
        before, self.known = self.known, self.known.join(known).answered(self.me)
        return self.known != before

    def waits_for(self) -> list[Member]:
        """The members that have not told the same yet."""
        def told(member: Member) -> bool:
            known, info = self._told.get(member, (None, None))
            return info is not None and known == self.known

        return [member for member in self.known.members() if member != self.me and not told(member)]

    def infos(self) -> dict[Member, object]:
        """What each member has told of itself, once nobody is waited for."""
        return {member: self.info if member == self.me else self._told[member][1] for member in self.known.members()}
