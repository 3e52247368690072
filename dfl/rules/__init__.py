"""How to combine what arrives: `build(name, layout, **parameters) -> Rule`."""

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dfl.factors import Layout
from dfl.plugins import check_parameters, first_line, lookup
from dfl.rules.alignment import fedrot
from dfl.rules.alternating import adf, rolora, tad
from dfl.rules.base import Round, Rule
from dfl.rules.broadcast import ps, sp
from dfl.rules.coefficients import flora_na
from dfl.rules.cores import fed_sb, ravan
from dfl.rules.factors import ffa, local, lora, share_a
from dfl.rules.orthonormal import fed_svd
from dfl.rules.padding import hetlora, replicate
from dfl.rules.products import decaf, florist
from dfl.rules.projection import lora_fair
from dfl.rules.residual import carry, fedex, fedex_choco, fedhl, flora
from dfl.rules.selection import lora_a2, plora
from dfl.rules.sketches import fedask
from dfl.rules.weighted import dora, hira

RULES: dict[str, Callable[..., Rule]] = {
    "lora": lora,
    "ffa": ffa,
    "share_a": share_a,
    "rolora": rolora,
    "adf": adf,
    "tad": tad,
    "lora_a2": lora_a2,
    "plora": plora,
    "fedrot": fedrot,
    "flora_na": flora_na,
    "lora_fair": lora_fair,
    "ps": ps,
    "sp": sp,
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
    "fed_sb": fed_sb,
    "ravan": ravan,
    "dora": dora,
    "hira": hira,
    "local": local,
}

__all__ = ["RULES", "Round", "Rule", "build", "check", "check_topology", "describe"]


def check(name: str, params: Mapping[str, object], ranks: Sequence[int] | None = None) -> None:
    """ValueError for an unknown rule or parameter, or peers of unequal ranks that it cannot mix, before anything is loaded."""
    check_parameters("rule", name, lookup("rule.name", RULES, name), params)
    if ranks is not None and not accepts(name, "ranks"):
        able = ", ".join(rule for rule in RULES if accepts(rule, "ranks"))
        raise ValueError(f"rule.name = {name!r} cannot mix peers of unequal ranks {sorted(set(ranks))}; allowed: {able}, "
                         "or one lora.rank")


def accepts(name: str, parameter: str) -> bool:
    """Whether the rule's factory has the parameter."""
    return parameter in inspect.signature(RULES[name]).parameters


def build(name: str, layout: Layout, *, ranks: Sequence[int] | None = None, peers: int | None = None, rank: int | None = None,
          **params) -> Rule:
    """The rule `name` for rows of `layout`. ValueError names an unknown rule or parameter and what is allowed.

    ranks: the rank of every peer, where they differ; the layout has the largest, the slots beyond a peer's rank are zero.
    peers, rank: how many peers there are, and the largest rank, for a rule that checks its parameters by them.
    """
    check(name, params, ranks)
    known = {"peers": peers, "rank": rank}
    params |= {key: value for key, value in known.items() if accepts(name, key)}
    return RULES[name](layout, **params, **({} if ranks is None else {"ranks": tuple(ranks)}))


def check_topology(name: str, rule: Rule, topology) -> None:
    """ValueError where W(t) changes but the rule needs one that does not, or needs equal rows and has others."""
    if rule.needs == "any":
        return
    # a mixing sequence from outside may not tell its period
    if getattr(topology, "period", None) != 1:
        raise ValueError(f"rule.name = {name!r} needs a topology that is the same in every round; allowed: ring, complete, ... "
                         "(`dfl list`)")
    w = topology.matrix(0)
    if rule.needs == "complete" and not np.allclose(w, w[0], rtol=0, atol=1e-12):
        raise ValueError(f"rule.name = {name!r} needs every peer to hear every other with equal weights; allowed: topology complete")


def describe() -> dict[str, str]:
    return {name: first_line(factory) for name, factory in RULES.items()}
