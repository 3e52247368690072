"""Activations that are computed again in the backward pass, with the same dropout: memory for time.

Chen, Xu, Zhang, Guestrin 2016, arXiv 1604.06174.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dfl.training.dropout import PeerDropout


def recompute_activations(model: Any) -> None:
    """Turn it on for training passes. ValueError for an architecture that has no layers to do it by."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"train.gradient_checkpointing = True: the architecture {model.config.model_type!r} cannot recompute its "
                         "activations; allowed: false")
    model.config.use_cache = False  # which would keep what is to be computed again; generation asks for it by itself
    given = {"use_reentrant": False, "context_fn": _contexts}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.24 and later
        model.activation_checkpointing_enable(given)
    else:
        model.gradient_checkpointing_enable(given)


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For a part of the forward pass, and for when it is computed again: peers' generators begin where they began."""
    active = PeerDropout.active
    return nullcontext(), nullcontext() if active is None else active.again()
