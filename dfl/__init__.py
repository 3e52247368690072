"""Decentralised gossip fine-tuning of LoRA factors: no server, no all-reduce."""

from importlib import import_module
from typing import Any

from dfl.run.callbacks import Callback

__all__ = ["Callback", "Gossip", "Result", "Simulation", "simulate", "train"]

# what waits until it is asked for: torch takes seconds to import, and a command's help does not need it
_LATER = {"Gossip": "script.loop", "Result": "result", "Simulation": "simulation", "simulate": "simulation", "train": "interface"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"dfl.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
