"""Weight rules: from the links of a round to the mixing matrix W, receiver-row (W[i, j] multiplies what i gets from j).

A *local* rule gives the weight of a link from what its two ends know (their ids and degrees), so that a peer computes
its own row alone. A *global* rule needs the whole graph. ``RULES`` lists them; ``make`` looks one up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import numpy as np

from topologies import optimal
from topologies.links import Links
from topologies.mixing import Entries, Rule, as_numbers, complement, halve
from topologies.registry import check_kind


def metropolis() -> Rule:
    """w_ij = 1 / (1 + max(d_i, d_j)) (Xiao, Boyd 2004; after Metropolis et al. 1953 and Hastings 1970)."""
    return Rule("metropolis", link=lambda i, j, d_i, d_j: 1.0 / (1.0 + np.maximum(d_i, d_j)))


def metropolis_tight() -> Rule:
    """w_ij = 1 / max(d_i, d_j): larger steps, but eigenvalue -1 on bipartite regular graphs (take it lazy there)."""
    return Rule("metropolis_tight", link=lambda i, j, d_i, d_j: 1.0 / np.maximum(d_i, d_j))


def lazy(of="metropolis") -> Rule:
    """(I + W) / 2 of another rule's W: positive semidefinite if that W is symmetric."""
    inner = make(of)
    traits = {"sums": inner.sums, "symmetric": inner.symmetric, "directed": inner.directed}
    if inner.solve is None and inner.own is None:
        return Rule("lazy", link=lambda *ends: inner.link(*ends) / 2, check=inner.check, **traits)
    return Rule("lazy", solve=lambda links: halve(inner(links)), check=inner.check, **traits)


def uniform() -> Rule:
    """w_ij = 1 / (d_i + 1): row-stochastic; the limit weighs peer i in proportion to d_i + 1."""
    return Rule("uniform", "row", False, True, link=lambda i, j, d_i, d_j: 1.0 / (1.0 + d_i))


def push_sum() -> Rule:
    """w_ij = 1 / (1 + outdeg_j), the sender splits its mass: column-stochastic (Kempe, Dobra, Gehrke 2003)."""
    return Rule(
        "push_sum", "column", False, True, link=lambda i, j, d_i, d_j: 1.0 / (1.0 + d_j), own=lambda d: 1.0 / (1.0 + d)
    )


def target(mass=None) -> Rule:
    """Hastings weights for the law pi in proportion to ``mass`` (data sizes, say): pi^T W = pi^T, rows sum to one.

    w_ij = (1 / d_i) min(1, pi_j d_i / (pi_i d_j)); consensus is the pi-weighted mean (Hastings 1970).
    """
    if mass is None:
        raise ValueError("weights='target' needs mass: a positive number for each peer, such as its number of examples")
    pi = as_numbers("target", "mass", mass)
    if pi.ndim != 1 or not np.isfinite(pi).all() or (pi <= 0).any():
        raise ValueError(f"weights='target' needs positive finite numbers as mass, got {mass!r}")

    def check(num_peers):
        if len(pi) != num_peers:
            raise ValueError(f"weights='target' got mass for {len(pi)} peers, the topology has {num_peers}")

    def link(i, j, d_i, d_j):
        return np.minimum(1.0 / d_i, pi[j] / (pi[i] * d_j))

    return Rule("target", "row", False, link=link, check=check)


def given() -> Rule:
    """w_ij is the number that came with the link (third column of an edge list, ``weight`` of a graph)."""
    return Rule("given", "row", False, True, solve=_given)


def _given(links: Links) -> Entries:
    if links.affinity is None:
        raise ValueError("weights='given' needs links that carry numbers, and these carry none")
    own = complement(links.affinity, links.receiver, links.num_peers)
    if own.min(initial=0.0) < 0:
        worst = int(own.argmin())
        raise ValueError(f"weights='given': what peer {worst} gives to others sums to {1 - own[worst]:.6g}, more than 1")
    return Entries(links, links.affinity, own)


def max_degree() -> Rule:
    """w_ij = 1 / (1 + max_k d_k), the same for every link."""

    def solve(links):
        weight = np.full(len(links.sender), 1.0 / (1.0 + links.in_degree.max()))
        return Entries(links, weight, complement(weight, links.receiver, links.num_peers))

    return Rule("max_degree", solve=solve)


# Name: (factory, one line, takes directed graphs).
RULES: dict[str, tuple[Callable[..., Rule], str, bool]] = {
    "metropolis": (metropolis, "1 / (1 + max(d_i, d_j)); doubly stochastic, needs only neighbours' degrees", False),
    "metropolis_tight": (metropolis_tight, "1 / max(d_i, d_j); faster, but stalls on bipartite regular graphs", False),
    "lazy": (lazy, "(I + W) / 2 of another rule (of); positive semidefinite", True),
    "max_degree": (max_degree, "1 / (1 + largest degree) on every link", False),
    "best_constant": (optimal.best_constant, "I - alpha L with the alpha of the smallest SLEM", False),
    "laplacian": (optimal.laplacian, "I - 2 L / (3 lambda_max(L)): the rule of Dec-LoRA", False),
    "fdla": (optimal.fdla, "smallest SLEM of all symmetric weights, negative ones allowed", False),
    "fastest_mixing_chain": (optimal.fastest_mixing_chain, "smallest SLEM of all symmetric non-negative weights", False),
    "link_reliability": (optimal.link_reliability, "smallest E|x - mean|^2 when links fail (success)", False),
    "sinkhorn": (optimal.sinkhorn, "scales affinities to row and column sums of one; directed graphs too", True),
    "uniform": (uniform, "1 / (1 + d_i); row-stochastic: biased towards well-connected peers", True),
    "push_sum": (push_sum, "1 / (1 + outdeg_j); column-stochastic, for push-sum on directed graphs", True),
    "target": (target, "Hastings weights whose consensus is the mean weighted by mass (data sizes)", False),
    "given": (given, "the numbers that came with the links of a file or a graph", True),
}


def make(spec) -> Rule:
    """A rule from its name, from ``{"rule": name, **parameters}``, or itself."""
    if isinstance(spec, Rule):
        return spec
    params = dict(spec) if isinstance(spec, Mapping) else {"rule": spec}
    name = params.pop("rule", None)
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"weights={name!r} is not known; known: {', '.join(RULES)}")
    factory = RULES[name][0]
    known = inspect.signature(factory).parameters
    for param in params:
        if param not in known:
            raise ValueError(f"weights={name!r} has no parameter {param!r}; it takes: {', '.join(known) or 'none'}")
        check_kind(f"weights={name!r}", known[param], params[param])
    return factory(**params)
