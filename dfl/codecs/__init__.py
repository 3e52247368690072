"""How a part of a message becomes bytes: a table from name to factory, `CODECS[name](**parameters) -> Codec`.

A codec that rounds must not undo training: a peer that replaced its own number by the rounded mean would stay for ever
where a round moves it by less than half the distance of two numbers. How the round prevents that is in
`dfl.engine.receiving` (`complete`); what codecs do about that which they leave out in `dfl.codecs.memory`.
"""

from collections.abc import Callable

from dfl.codecs.blocks import int4, int8
from dfl.codecs.levels import qsgd, sign
from dfl.codecs.low_rank import low_rank
from dfl.codecs.rounding import bfloat16, float16, none
from dfl.codecs.sparse import random_k, top_k
from dfl.slots import Codec

CODECS: dict[str, Callable[..., Codec]] = {"none": none, "bfloat16": bfloat16, "float16": float16, "int8": int8, "int4": int4,
                                           "qsgd": qsgd, "sign": sign, "top_k": top_k, "random_k": random_k, "low_rank": low_rank}
