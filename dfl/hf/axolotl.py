"""A plug-in of axolotl, so that its configuration file makes each of its processes a peer:

    plugins: [dfl.hf.axolotl.GossipPlugin]
    gossip: {method: tad, topology: ring, every: 20}

`gossip` holds the words of `dfl.hf.join`. axolotl loads plug-ins before it asks how many processes there are.
"""

from typing import Any

from pydantic import BaseModel

from dfl.hf import join, patch
from dfl.script.joining import current

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # without axolotl the class can still be looked at
    BasePlugin = object


class GossipArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration: the words of `dfl.hf.join`."""

    gossip: dict[str, Any] | None = None


class GossipPlugin(BasePlugin):
    """Joins when axolotl registers it, and patches the trainer that axolotl makes."""

    def get_input_args(self) -> str | None:
        return "dfl.hf.axolotl.GossipArgs"

    def register(self, cfg: dict) -> None:
        """Join once, also where axolotl registers its plug-ins again. ValueError without `gossip`."""
        if current() is not None:
            return
        words = cfg.get("gossip")
        if not isinstance(words, dict):
            raise ValueError(f"gossip = {words!r} is not allowed; allowed: a mapping with the words of dfl.hf.join, such as "
                             "gossip: {method: tad, topology: ring, every: 20}")
        join(**words)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        patch(trainer)
