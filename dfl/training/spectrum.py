"""How many directions the inputs of a layer fill: the participation ratio of their covariance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.training.executors import Sequential

TOKENS = 512  # inputs of a layer that are looked at, at most


@torch.no_grad()
def participation(adapted: Adapted, task, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """(sum_k sigma_k)^2 / sum_k sigma_k^2 of every adapted layer, sigma_k the eigenvalues of H^T H, H (T, I) its inputs, on the base
    model: tr(G)^2 / ||G||_F^2 of the Gram matrix G = H H^T. Between 1 and min(T, I)."""
    seen: dict[int, list[Tensor]] = {number: [] for number in range(len(adapted.sites))}

    def look(number: int):
        def hook(module, args):
            seen[number].append(args[0].detach().reshape(-1, args[0].shape[-1]).double().cpu())
        return hook

    handles = [site.module.register_forward_pre_hook(look(number)) for number, site in enumerate(adapted.sites)]
    adapted.model.eval()
    rows = Rows(adapted.factors(adapted.start[None].to(adapted.sites[0].weight.device)))
    try:
        with Sequential().bound(adapted, rows, None, [0]) as forward:
            for batch in batches:
                forward(task.inputs(batch), [0])
    finally:
        for handle in handles:
            handle.remove()
    return [_ratio(torch.cat(inputs)) for inputs in seen.values()]


def _ratio(inputs: Tensor) -> float:
    chosen = inputs[torch.linspace(0, len(inputs) - 1, min(TOKENS, len(inputs))).long()]
    gram = chosen @ chosen.T
    return float(gram.trace() ** 2 / gram.square().sum().clamp_min(1e-30))
