"""The trackers that a run can report to, and whether they are installed."""

from collections.abc import Iterable
from importlib import import_module

from dfl.plugins import did_you_mean

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "none")


def check_trackers(names: Iterable[str]) -> None:
    """ValueError for a tracker we do not know or that is not installed."""
    for name in names:
        if name == "none":
            continue
        if name not in TRACKERS:
            raise ValueError(f"report_to = {name!r} is not known{did_you_mean(name, TRACKERS)}; allowed: {', '.join(TRACKERS)}")
        try:
            module = import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            module = None
        if getattr(module, "__file__", None) is None:  # a mere folder of that name, such as W&B leaves behind, imports too
            raise ValueError(f"report_to = {name!r}: the package is not installed; pip install {name}") from None
