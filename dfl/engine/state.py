"""One tree for all that a run must not forget: {slot: {peer, or peer/neighbour: {name: tensor}}}.

Snapshot, roll-back, checkpoint and resume are functions over it. Tensors in it are replaced, never changed in place, so
that a snapshot is a copy of the dictionaries alone.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from dfl.slots import State

Tree = dict[str, dict[str, State]]


def edge(peer: int, neighbour: int) -> str:
    """The key of what `peer` remembers of a neighbour."""
    return f"{peer}/{neighbour}"


def owner(key: str) -> int:
    """The peer that a key belongs to."""
    return int(key.partition("/")[0])


def snapshot(tree: Tree) -> Tree:
    return {slot: {key: dict(state) for key, state in held.items()} for slot, held in tree.items()}


def flatten(tree: Tree) -> dict[str, Tensor]:
    """By `slot.key.name`, for a file."""
    return {f"{slot}.{key}.{name}": value for slot, held in tree.items() for key, state in held.items()
            for name, value in state.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> Tree:
    """What `flatten` was given, but for slots and keys without tensors."""
    tree: Tree = {}
    for name, value in tensors.items():
        slot, key, rest = name.split(".", 2)
        tree.setdefault(slot, {}).setdefault(key, {})[rest] = value
    return tree


def of_peers(tree: Tree, peers: Iterable[int]) -> Tree:
    """The part that belongs to `peers`."""
    wanted = set(peers)
    return {slot: {key: state for key, state in held.items() if owner(key) in wanted} for slot, held in tree.items()}
