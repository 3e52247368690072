"""How a part of a message becomes bytes: a table from name to factory, `CODECS[name](**parameters) -> Codec`.

A codec that rounds must not undo training: a peer that replaced its own number by the rounded mean would stay for ever
where a round moves it by less than half the distance of two numbers. How the round prevents that is in
`dfl.engine.gossip` (`_complete`).
"""

from collections.abc import Callable

from dfl.codecs.int8 import int8
from dfl.codecs.rounding import bfloat16, float16, none
from dfl.slots import Codec

CODECS: dict[str, Callable[..., Codec]] = {"none": none, "bfloat16": bfloat16, "float16": float16, "int8": int8}
