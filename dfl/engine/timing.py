"""Seconds of the phases of a round."""

import time

import torch
from torch import Tensor


def now(x: Tensor) -> float:
    """Seconds of a clock, once all that was begun where `x` is has been done: on a GPU work goes on behind the host's back, and would
    count for the phase that first asks for a result."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
