"""How messages move: inside a process, or between processes over torch.distributed."""

from dfl.transport.base import Transport, edges_of, hosting
from dfl.transport.distributed import Distributed
from dfl.transport.local import InProcess

__all__ = ["Distributed", "InProcess", "Transport", "edges_of", "hosting"]
