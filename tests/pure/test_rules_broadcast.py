"""Sum of products and product of sums: what they are, and their mismatches against dense numpy."""

import numpy as np
import pytest
import torch
from test_rules import CODEC, LAYOUT, NUM, mix_once, product, random_rows, ring

from dfl import rules
from dfl.gossip import gossip
from dfl.transport import InProcess

FACTORS = slice(0, LAYOUT.groups["B"].stop)


def run(name, x, w):
    rule, out = rules.build(name, LAYOUT), x.clone()
    states = [rule.init(row) for row in x]
    gossip(rule, CODEC, InProcess(), out, range(NUM), states, w, 0)
    return out, states


def test_ps_is_lora_and_sp_is_decaf_to_the_bit():
    x = random_rows()
    assert torch.equal(mix_once("ps", x, ring(), head="mixed"), mix_once("lora", x, ring(), head="mixed"))
    assert torch.equal(mix_once("sp", x, ring(), split="left"), mix_once("decaf", x, ring(), split="left"))
    assert rules.build("ps", LAYOUT).linear and not rules.build("sp", LAYOUT).linear


@pytest.mark.parametrize("name", ["sp", "ps"])
def test_mismatches_are_the_dense_ones(name):
    x, w = random_rows(), ring()
    out, states = run(name, x, w)
    before, after = product(x).numpy(), product(out).numpy()
    for i, state in enumerate(states):
        heard = np.flatnonzero(w[i])
        assert float(state["R_weak"]) == pytest.approx(np.linalg.norm(after[i] - before[heard], axis=1).max(), rel=1e-9)
        factors = ((out[i, FACTORS] - x[heard][:, FACTORS]) ** 2).sum(1)
        assert float(state["R_strong"]) == pytest.approx(float(factors.mean()), rel=1e-9)
        target = w[i] @ before
        expected = np.linalg.norm(after[i] - target) / np.linalg.norm(target)
        assert float(state["aggregation_error_relative"]) == pytest.approx(expected, rel=1e-6)


def test_each_is_best_at_its_own_condition():
    x, w = random_rows(), ring()
    (sums, of_sp), (means, of_ps) = run("sp", x, w), run("ps", x, w)
    for i, (one, other) in enumerate(zip(of_sp, of_ps, strict=True)):
        assert other["R_strong"] < one["R_strong"] and one["aggregation_error_relative"] < other["aggregation_error_relative"]
        heard = np.flatnonzero(w[i])
        weak = [float((product(rows)[i] - product(x)[heard]).square().sum(1).mean()) for rows in (sums, means)]
        assert weak[0] < weak[1]


def test_agreement_has_no_mismatch_and_solitude_reports_none():
    x = random_rows(num=1).expand(NUM, -1).clone()
    for state in run("ps", x, ring())[1]:
        assert state["R_weak"] < 1e-6 and state["R_strong"] < 1e-12 and state["largest_factor"] > 1
    for state in run("sp", random_rows(), np.eye(NUM))[1]:
        assert all(value == 0 for value in state.values()) and len(state) == 4
