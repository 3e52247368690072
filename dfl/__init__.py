"""Decentralised gossip fine-tuning of LoRA factors: no server, no all-reduce."""

from dfl.callbacks import Callback

__version__ = "0.1.0"
__all__ = ["Callback", "Simulation", "simulate"]


def __getattr__(name: str):
    """The simulator, once it is asked for: it needs torch, which takes seconds to import, and a command's help does not."""
    if name in ("Simulation", "simulate"):
        from dfl import simulation
        return getattr(simulation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
