"""The optimisers and the schedules of the learning rate by name; without torch, so that a recipe is refused before it is imported."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dfl.plugins import check_fraction, check_parameters, check_positive, lookup


class Optimizer(NamedTuple):
    """about: a line. source: where the class is. kept: bytes that are kept of each number that is trained.

    turns: whether what it keeps can be turned with the basis of the factors. masks: whether a number may be left out.
    paged: it needs a GPU, whose memory is emptied into that of the machine.
    """

    about: str
    source: str
    kept: float
    turns: bool = True
    masks: bool = True
    paged: bool = False


_BNB = "bitsandbytes.optim."
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer("Adam with decoupled weight decay (Loshchilov, Hutter 2017, arXiv 1711.05101).", "torch.optim.AdamW", 8),
    "sgd": Optimizer("Gradient descent, with train.momentum.", "torch.optim.SGD", 4),
    "rmsprop": Optimizer("RMSprop, with train.momentum.", "torch.optim.RMSprop", 8, turns=False),
    "nadam": Optimizer("Adam with Nesterov's momentum.", "torch.optim.NAdam", 8, False, False),
    "radam": Optimizer("Adam with a warm-up of its own (Liu et al. 2019, arXiv 1908.03265).", "torch.optim.RAdam", 8, turns=False),
    "lion": Optimizer("The sign of a momentum (Chen et al. 2023, arXiv 2302.06675).", _BNB + "Lion", 4, False, False),
    "adamw_8bit": Optimizer("adamw with moments of one byte (Dettmers et al. 2021, arXiv 2110.02861).", _BNB + "AdamW8bit", 2, False,
                            False),
    "lion_8bit": Optimizer("lion with a momentum of one byte.", _BNB + "Lion8bit", 1, False, False),
    "paged_adamw": Optimizer("adamw whose moments leave a full GPU.", _BNB + "PagedAdamW32bit", 8, False, False, True),
    "paged_adamw_8bit": Optimizer("adamw_8bit whose moments leave a full GPU.", _BNB + "PagedAdamW8bit", 2, False, False, True),
    "paged_lion": Optimizer("lion whose momentum leaves a full GPU.", _BNB + "PagedLion32bit", 4, False, False, True),
    "paged_lion_8bit": Optimizer("lion_8bit whose momentum leaves a full GPU.", _BNB + "PagedLion8bit", 1, False, False, True),
}


def check_optimizer(name: str, at_refactor: str) -> None:
    """ValueError for a name that is not known, and for a library that is not installed."""
    from importlib.util import find_spec
    chosen = lookup("train.optimizer", OPTIMIZERS, name)
    package = chosen.source.partition(".")[0]
    if find_spec(package) is None:
        inside = [other for other, one in OPTIMIZERS.items() if one.source.startswith("torch.")]
        raise ValueError(f"train.optimizer = {name!r} is one of {package}, which is not installed; pip install 'dfl[quantized]'; "
                         f"without it: {', '.join(inside)}")


# what multiplies train.lr at `rest` in [0, 1] of the run behind its warm-up of the fraction `warmup`
Factor = Callable[[float, float], float]


def constant() -> Factor:
    """The same throughout."""
    return lambda rest, warmup: 1.0


def linear() -> Factor:
    """Down to 0."""
    return lambda rest, warmup: 1 - rest


def cosine(*, num_cycles: float = 0.5) -> Factor:
    """Down to 0 along a cosine; half a cycle of it."""
    check_positive("train.schedule.num_cycles", num_cycles)
    return lambda rest, warmup: max(0.0, (1 + math.cos(2 * math.pi * num_cycles * rest)) / 2)


def cosine_with_restarts(*, num_cycles: int = 1) -> Factor:
    """Several times down to 0 along half a cosine, and up again at once."""
    check_positive("train.schedule.num_cycles", num_cycles)
    return lambda rest, warmup: 0.0 if rest >= 1 else (1 + math.cos(math.pi * (num_cycles * rest % 1))) / 2


def cosine_with_min_lr(*, min_lr_rate: float, num_cycles: float = 0.5) -> Factor:
    """Along a cosine down to the part min_lr_rate of train.lr."""
    check_fraction("train.schedule.min_lr_rate", min_lr_rate)
    inner = cosine(num_cycles=num_cycles)
    return lambda rest, warmup: min_lr_rate + (1 - min_lr_rate) * inner(rest, warmup)


def polynomial(*, power: float = 1.0, end: float = 0.0) -> Factor:
    """Down to the part `end` of train.lr, as a power of what is left of the run."""
    check_positive("train.schedule.power", power)
    check_fraction("train.schedule.end", end)
    return lambda rest, warmup: end + (1 - end) * (1 - rest) ** power


def inverse_sqrt(*, timescale: float | None = None) -> Factor:
    """Falls as the root of the time, from a timescale on (a fraction of the run; null: train.warmup)."""
    if timescale is not None:
        check_positive("train.schedule.timescale", timescale)

    def factor(rest: float, warmup: float) -> float:
        scale = timescale or warmup
        if not scale:
            raise ValueError("train.schedule = 'inverse_sqrt' falls from the end of the warm-up on; give train.warmup, or timescale")
        return (1 + rest * (1 - warmup) / scale) ** -0.5

    return factor


def warmup_stable_decay(*, decay: float = 0.2, kind: str = "linear") -> Factor:
    """The same until the last part `decay` of the run, then down to 0: linear or cosine."""
    check_fraction("train.schedule.decay", decay)
    down = lookup("train.schedule.kind", {"linear": linear(), "cosine": cosine()}, kind)

    def factor(rest: float, warmup: float) -> float:
        start = 1 - decay / (1 - warmup)
        return 1.0 if rest <= start or not decay else down((rest - start) / (1 - start), warmup)

    return factor


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant, "constant_with_warmup": constant, "linear": linear, "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts, "cosine_with_min_lr": cosine_with_min_lr, "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt, "warmup_stable_decay": warmup_stable_decay}


def schedule_factor(name: str, params: Any, warmup: float) -> Factor:
    """ValueError for a schedule or a parameter that is not known, or that the warm-up does not fit."""
    check_parameters("train.schedule", name, lookup("train.schedule", SCHEDULES, name), params)
    made = SCHEDULES[name](**params)
    made(0.0, warmup)
    return made
