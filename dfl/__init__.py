"""Decentralised gossip fine-tuning of LoRA factors: no server, no all-reduce."""

from dfl.callbacks import Callback
from dfl.simulate import Simulation, simulate

__version__ = "0.1.0"
__all__ = ["Callback", "Simulation", "simulate"]
