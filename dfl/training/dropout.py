"""Dropout from one generator per peer, so that a peer's masks do not depend on who is hosted beside it."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Cut(NamedTuple):
    """Of a batch of `whole` examples a pass sees `number`, from `first` on: its masks are those rows of the whole batch's."""

    first: int
    number: int
    whole: int


class PeerDropout(TorchFunctionMode):
    """While active, every dropout draws the mask of each peer's block of rows from that peer's generator.

    The batch of a forward pass is the equal blocks of `generators`' peers, one after the other. Dropout inside
    scaled_dot_product_attention is covered too: there the attention is written out, since the kernel draws by itself.
    cut: of one peer, where other processes see the rest of its batch.
    """

    active: ClassVar["PeerDropout | None"] = None

    def __init__(self, generators: Sequence[torch.Generator], cut: Cut | None = None):
        super().__init__()
        assert cut is None or len(generators) == 1
        self.generators, self.cut = generators, cut

    def __enter__(self) -> "PeerDropout":
        self.before, PeerDropout.active = PeerDropout.active, self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        PeerDropout.active = self.before
        super().__exit__(*error)

    def again(self) -> "PeerDropout":
        """The same from now on, for whoever computes a part of the pass a second time."""
        copies = [torch.Generator(generator.device) for generator in self.generators]
        for copy, generator in zip(copies, self.generators, strict=True):
            copy.set_state(generator.get_state())
        return PeerDropout(copies, self.cut)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and _attention_dropout(*args, **kwargs) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        return input * self._mask(input, p).div_(1 - p)

    def _mask(self, input: Tensor, p: float) -> Tensor:
        cut = self.cut
        if cut is not None and len(input) % cut.number == 0:  # rows of examples, as in most layers
            each = len(input) // cut.number
            mask = input.new_empty(cut.whole * each, *input.shape[1:]).bernoulli_(1 - p, generator=self.generators[0])
            return mask[cut.first * each:(cut.first + cut.number) * each]
        # contiguous, so that the outermost blocks are the peers' also where the input is a transposed view
        mask = torch.empty_like(input, memory_format=torch.contiguous_format)
        for block, generator in zip(mask.view(len(self.generators), -1), self.generators, strict=True):
            block.bernoulli_(1 - p, generator=generator)
        return mask

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = (scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min) if attn_mask.dtype == torch.bool
                      else scores + attn_mask)
        return self._dropout(scores.softmax(-1), dropout_p) @ value


def _attention_dropout(query, key, value, attn_mask=None, dropout_p=0.0, *rest, **kwargs) -> float:
    return dropout_p
