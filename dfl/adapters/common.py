"""What all peers must share: a digest of the numbers that stay the same for ever."""

import hashlib

import torch
from torch import Tensor

from dfl.adapters.layout import Layout


def digest_of_common(groups: frozenset[str], layout: Layout, x: Tensor) -> int:
    """A 32-bit number that all peers must share: what the groups that stay the same for ever hold (0: there are none).

    x (P, D): the rows of the hosted peers. TypeError when they differ among themselves: what was trained beside one
    frozen A means nothing beside another.
    """
    if not groups:
        return 0
    digests = {hashlib.sha256(torch.cat([row[cut] for cut in layout.columns(groups)]).cpu().numpy().tobytes()).digest()
               for row in x}
    if len(digests) > 1:
        raise TypeError(f"the peers hold {len(digests)} different {'+'.join(sorted(groups))}, which this rule never mixes; "
                        "all must start from the same")
    return int.from_bytes(digests.pop()[:4], "big") or 1
