"""Optimisers across peers, as wrappers around a rule.

A table from name to factory: `WRAPPERS[name](rule, **parameters) -> Rule`.
"""

from collections.abc import Callable

from dfl.slots import Rule
from dfl.wrappers.adaptive import adaptive_consensus
from dfl.wrappers.diffusion import d2, exact_diffusion
from dfl.wrappers.flexatc import flexatc, led, proxskip
from dfl.wrappers.gradient_tracking import gradient_tracking, momentum_tracking
from dfl.wrappers.momentum import quasi_global
from dfl.wrappers.muffliato import muffliato
from dfl.wrappers.none import none
from dfl.wrappers.outer import outer
from dfl.wrappers.push import push_diging, push_sum
from dfl.wrappers.relay import relay
from dfl.wrappers.updates import updates

WRAPPERS: dict[str, Callable[..., Rule]] = {
    "none": none,
    "gradient_tracking": gradient_tracking,
    "momentum_tracking": momentum_tracking,
    "exact_diffusion": exact_diffusion,
    "d2": d2,
    "led": led,
    "proxskip": proxskip,
    "flexatc": flexatc,
    "quasi_global": quasi_global,
    "push_sum": push_sum,
    "push_diging": push_diging,
    "relay": relay,
    "outer": outer,
    "adaptive_consensus": adaptive_consensus,
    "updates": updates,
    "muffliato": muffliato,
}
