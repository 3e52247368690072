"""How messages move: inside a process, or between processes over torch.distributed."""

from dfl.transport.base import Transport, edges_of, hosting
from dfl.transport.local import InProcess

__all__ = ["InProcess", "Transport", "edges_of", "hosting"]
