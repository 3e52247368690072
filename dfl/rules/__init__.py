"""How to combine what arrives: a table from name to factory, `RULES[name](layout, **parameters) -> Rule`."""

from collections.abc import Callable

from dfl.rules.alignment import fedrot
from dfl.rules.average import average, ravan
from dfl.rules.bank import task_bank
from dfl.rules.coefficients import flora_na
from dfl.rules.orthonormal import fed_svd
from dfl.rules.padding import hetlora, replicate
from dfl.rules.products import decaf, florist
from dfl.rules.projection import lora_fair
from dfl.rules.residual import carry, fedex, fedex_choco, fedhl, flora
from dfl.rules.salf import salf
from dfl.rules.selection import lora_a2, plora
from dfl.rules.sketches import fedask
from dfl.rules.weighted import dora, hira
from dfl.slots import Rule

RULES: dict[str, Callable[..., Rule]] = {
    "average": average,
    "lora_a2": lora_a2,
    "plora": plora,
    "salf": salf,
    "fedrot": fedrot,
    "flora_na": flora_na,
    "lora_fair": lora_fair,
    "fed_svd": fed_svd,
    "decaf": decaf,
    "florist": florist,
    "fedask": fedask,
    "hetlora": hetlora,
    "replicate": replicate,
    "fedhl": fedhl,
    "carry": carry,
    "fedex": fedex,
    "fedex_choco": fedex_choco,
    "flora": flora,
    "task_bank": task_bank,
    "ravan": ravan,
    "dora": dora,
    "hira": hira,
}
