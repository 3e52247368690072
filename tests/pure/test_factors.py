"""Pairs of several layouts joined into one of summed rank, against dense products."""

import numpy as np
import pytest
import torch

from dfl.adapters.layout import a_view, b_view, join, join_rows, make_layout

LAYERS = [("q", 7, 9, 0.5), ("v", 4, 6, 2.0)]  # name, I, O, scaling
FIRST = make_layout([(name, 2, i, o, s) for name, i, o, s in LAYERS], head=[("head", (3,))])
SECOND = make_layout([(name, rank, i, o, 1.0) for (name, i, o, _), rank in zip(LAYERS, (5, 3), strict=True)])


def rows(layout, *num, seed=0):
    return torch.randn(*num, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_products_add_up_in_layers_of_summed_rank():
    x, other, joined = rows(FIRST, 3), rows(SECOND, 3, seed=1), join((FIRST, SECOND))
    out = join_rows(joined, (FIRST, SECOND), (x, other), 3)
    assert [(p.name, p.rank, p.d_in, p.d_out, p.scaling) for p in joined.pairs] == [("q", 7, 7, 9, 0.5), ("v", 5, 4, 6, 2.0)]
    assert out.shape == (3, joined.size) and out.dtype == x.dtype
    for pair, mine, its in zip(joined.pairs, FIRST.pairs, SECOND.pairs, strict=True):
        expected = sum(np.einsum("nor,nri->noi", b_view(r, p), a_view(r, p)) for r, p in ((x, mine), (other, its)))
        np.testing.assert_allclose(b_view(out, pair) @ a_view(out, pair), expected, atol=1e-12)
        assert torch.equal(a_view(out, pair)[:, :2], a_view(x, mine)) and torch.equal(b_view(out, pair)[..., 2:], b_view(other, its))


def test_one_row_serves_all_and_what_is_missing_is_zero():
    constant, joined = rows(FIRST), join((FIRST, SECOND))
    out = join_rows(joined, [FIRST], [constant], 4)
    for pair, mine in zip(joined.pairs, FIRST.pairs, strict=True):
        assert all(torch.equal(a[:2], a_view(constant, mine)) for a in a_view(out, pair))
        assert (a_view(out, pair)[:, 2:] == 0).all() and (b_view(out, pair)[..., 2:] == 0).all()


@pytest.mark.parametrize("slots", [(1, 2), (2, 4)])
def test_counted_slots_are_cut_or_padded(slots):
    """(2, 4): layer v has three slots in the second part, and gets four."""
    x, other, joined = rows(FIRST, 1), rows(SECOND, 1, seed=1), join((FIRST, SECOND), slots)
    out = join_rows(joined, (FIRST, SECOND), (x, other), 1, slots)
    for pair, mine, its in zip(joined.pairs, FIRST.pairs, SECOND.pairs, strict=True):
        assert pair.rank == sum(slots)
        dense = [(b_view(r, p)[0, :, :n] @ a_view(r, p)[0, :n]).numpy() for r, p, n in ((x, mine, slots[0]), (other, its, slots[1]))]
        np.testing.assert_allclose((b_view(out, pair) @ a_view(out, pair))[0], sum(dense), atol=1e-12)
        held = slots[0] + min(slots[1], its.rank)
        assert (a_view(out, pair)[0, held:] == 0).all() and (b_view(out, pair)[0, :, held:] == 0).all()


def test_layouts_of_different_layers_do_not_join():
    with pytest.raises(ValueError):
        join((FIRST, make_layout([("q", 2, 7, 9, 1.0)])))
