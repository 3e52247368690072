"""The smallest promises: names, rows, random access, and the closed forms of the first graphs."""

import numpy as np
import pytest

import topologies
from topologies import spectrum


def cases():
    yield "ring", {}
    yield "complete", {}
    yield "star", {}
    yield "edge_activation", {"p": 0.3}
    yield "edge_activation", {"p": 0.5, "base": "ring"}
    yield "one_peer_exponential", {}


@pytest.mark.parametrize("name, params", cases())
@pytest.mark.parametrize("n", range(1, 12))
def test_rows_and_columns_sum_to_one_and_rows_agree(name, params, n):
    topology = topologies.build(name, n, **params)
    for t in (0, 1, 5):
        W = topology.matrix(t)
        np.testing.assert_allclose(W.sum(0), 1, atol=1e-12)
        np.testing.assert_allclose(W.sum(1), 1, atol=1e-12)
        for i in range(n):
            row = np.zeros(n)
            for j, w in topology.neighbors(t, i).items():
                row[j] = w
            assert (row == W[i]).all()


def test_ring_closed_form():
    for n in (4, 5, 10, 16):
        expected = (1 + 2 * np.cos(2 * np.pi / n)) / 3
        assert spectrum.slem(topologies.build("ring", n).matrix(0)) == pytest.approx(expected, abs=1e-12)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="known: .*ring"):
        topologies.build("rign", 4)
    with pytest.raises(ValueError, match="no parameter 'q'"):
        topologies.build("ring", 4, q=1)
    with pytest.raises(ValueError, match="needs the parameter 'p'"):
        topologies.build("edge_activation", 4)
