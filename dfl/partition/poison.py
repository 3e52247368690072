"""Wrong labels at some peers, for experiments with guards."""

from collections.abc import Collection, Sequence
from typing import Any


class FlippedLabels(Sequence):
    """The features of a split in which class c of the examples `at` is class C - 1 - c (label flip); all else is theirs."""

    def __init__(self, features: Sequence[dict[str, Any]], at: Collection[int], num_classes: int):
        self.features, self.at, self.num_classes = features, frozenset(at), num_classes

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        feature = self.features[i]
        place = range(len(self))[int(i)]
        return feature | {"labels": self.num_classes - 1 - feature["labels"]} if place in self.at else feature

    def __getattr__(self, name: str) -> Any:
        if name == "features":  # before it is there, as when copied
            raise AttributeError(name)
        return getattr(self.features, name)
