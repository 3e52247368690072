"""Weighted sums of messages, written into the rows of the hosted peers: the mix of a rule that only averages, on a CPU.

The sum goes block by block through a scratch that stays in a core's cache, and its last term is added where the result belongs: a row
is read once and written once, and no memory is asked for. The bits are those of `dfl.rules.base.mean_of_groups`.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.slots import Inbox, Round

# numbers of the scratch: 256 KiB in float32 for one row, 1 MiB for all where there are several, at least so many of each
ONE, SEVERAL, LEAST = 2**16, 2**18, 2**14
Parts = Mapping[str, Tensor]
Terms = Sequence[tuple[Parts, float]]  # parts of a message, and its weight, by ascending peer
Sum = Sequence[tuple[Tensor, float]]  # the same of some columns of a row


def terms_of(inbox: Inbox, round: Round) -> Terms:
    return [(inbox[j].parts, float(round.weights[j])) for j in sorted(inbox)]


class Averaging:
    """Rows in `layout`. The scratch is kept from round to round: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, layout: Layout):
        self.layout, self.scratch = layout, torch.empty(0)

    def __call__(self, x: Tensor, groups: Collection[str], sums: Mapping[int, Terms]) -> None:
        """x_F,i <- sum_j w_ij F_j for the groups F and the rows i of `sums`, in x (P, D); messages may be views of x."""
        block = ONE if len(sums) < 2 else max(LEAST, SEVERAL // len(sums) // 16 * 16)
        for columns, names in self._pieces(groups):
            joined = _joined(names, [parts for terms in sums.values() for parts, _ in terms])
            for cut, name in [(columns, "")] if joined else [(self.layout.groups[name], name) for name in names]:
                found = {row: [(joined[id(parts)] if joined else parts[name], weight) for parts, weight in terms]
                         for row, terms in sums.items()}
                self._columns(x[:, cut], found, block)

    def _pieces(self, groups: Collection[str]) -> list[tuple[slice, list[str]]]:
        """The columns of the groups in as few slices as possible, and the groups in each."""
        present = self.layout.present(groups)
        return [(cut, [name for name in present if cut.start <= self.layout.groups[name].start < cut.stop])
                for cut in self.layout.columns(groups)]

    def _columns(self, target: Tensor, sums: Mapping[int, Sum], block: int) -> None:
        """Some columns of all rows, target (P, K), in blocks of multiples of 64 bytes, so that kernels meet the same numbers in their
        vectors as in one piece."""
        room = len(sums) * min(block, target.shape[1])
        if self.scratch.dtype != target.dtype or self.scratch.numel() < room:
            self.scratch = torch.empty(room, dtype=target.dtype)
        if target.shape[1] <= block:
            self._block(target, sums)
            return
        pieces = {row: [(values.split(block), weight) for values, weight in terms] for row, terms in sums.items()}
        for k, piece in enumerate(target.split(block, 1)):
            self._block(piece, {row: [(split[k], weight) for split, weight in terms] for row, terms in pieces.items()})

    def _block(self, target: Tensor, sums: Mapping[int, Sum]) -> None:
        """The same for some columns, target (P, K); each sum has its tensors (K,)."""
        length = target.shape[1]
        if len(sums) == 1:  # nobody else's sum needs the row that it replaces
            (row, terms), = sums.items()
            _weighted_sum(terms, self.scratch[:length], target[row])
            return
        made = self.scratch[:len(sums) * length].view(len(sums), length)
        for out, terms in zip(made, sums.values(), strict=True):
            _weighted_sum(terms, out, out)
        if len(sums) == len(target):
            target.copy_(made)
        else:
            for row, new in zip(sums, made, strict=True):
                target[row] = new


def _joined(names: Sequence[str], messages: Sequence[Parts]) -> dict[int, Tensor]:
    """The parts `names` of each message as one tensor, by the id of its parts; nothing where they do not lie side by side in all."""
    found: dict[int, Tensor] = {}
    for parts in messages:
        if id(parts) not in found:
            first, *rest = [parts[name] for name in names]
            length = first.numel()
            for part in rest:
                if part.data_ptr() != first.data_ptr() + length * first.itemsize or part.dtype != first.dtype:
                    return {}
                length += part.numel()
            if rest and first.storage_offset() + length > first.untyped_storage().nbytes() // first.itemsize:
                return {}  # by accident: of another storage
            found[id(parts)] = first.as_strided((length,), (1,)) if rest else first
    return found


def _weighted_sum(terms: Sum, scratch: Tensor, out: Tensor) -> None:
    """out <- sum of weight times values, in the order of the terms, of which any may be `out`; scratch may be `out` if none is."""
    (values, weight), *rest = terms
    if not rest:
        torch.mul(values, weight, out=out)
        return
    torch.mul(values, weight, out=scratch)
    for values, weight in rest[:-1]:
        scratch.add_(values, alpha=weight)
    torch.add(scratch, rest[-1][0], alpha=rest[-1][1], out=out)
