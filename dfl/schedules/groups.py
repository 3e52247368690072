"""What a row has beside A and B, and what becomes of it in every schedule."""

from typing import NamedTuple

from dfl.adapters.layout import Layout
from dfl.plugins import check_choice
from dfl.slots import Plan

BOTH, NOTHING = frozenset({"A", "B"}), frozenset[str]()
HEADS = ("frozen", "mixed", "local")


class Groups(NamedTuple):
    """factors: what stands for both factors, A and B or the cores between frozen bases. trained, mixed: what is
    trained, and averaged, beside them whenever anything is exchanged: magnitudes, and the head."""

    factors: frozenset[str]
    trained: frozenset[str]
    mixed: frozenset[str]

    @property
    def kind(self) -> str:
        return "core" if "core" in self.factors else "pairs"

    def plan(self, trains: frozenset[str], sends: frozenset[str]) -> Plan:
        return Plan(trains | self.trained, sends | self.mixed if sends else sends)


def groups_of(layout: Layout, head: str = "frozen") -> Groups:
    """`head`: frozen, mixed (trained, and mixed with what is exchanged) or local (trained and never sent)."""
    check_choice("head", head, HEADS)
    magnitudes = frozenset({"M"}) if layout.has("M") else NOTHING
    heads = frozenset({"head"}) if layout.has("head") else NOTHING
    return Groups(frozenset({"core"}) if layout.has("core") else BOTH, magnitudes | (heads if head != "frozen" else NOTHING),
                  magnitudes | (heads if head == "mixed" else NOTHING))
