"""LoRA-FAIR against the dense closed form and the dense projection."""

import numpy as np
import pytest
import torch
from one_round import build
from test_rules import LAYOUT, NUM, mix_once, product, random_rows, ring
from test_rules_aggregation import drifted, errors

from dfl.adapters.layout import a_view, b_view


@pytest.mark.parametrize("ridge", [0.0, 0.01, 10.0])
def test_is_the_dense_closed_form(ridge):
    x, w = random_rows(), ring()
    mixed = mix_once("lora_fair", x, w, ridge=ridge)
    for pair in LAYOUT.pairs:
        a, b = a_view(x, pair).numpy(), b_view(x, pair).numpy()
        for i in range(NUM):
            mean_a, mean_b = np.einsum("j,jri->ri", w[i], a), np.einsum("j,jor->or", w[i], b)
            target = np.einsum("j,jor,jri->oi", w[i], b, a)
            inverse = np.linalg.inv(mean_a @ mean_a.T + ridge * np.eye(2))
            expected = mean_b + (target - mean_b @ mean_a) @ mean_a.T @ inverse
            np.testing.assert_allclose(b_view(mixed, pair)[i], expected, atol=1e-10)
            np.testing.assert_allclose(a_view(mixed, pair)[i], mean_a, atol=1e-14)


def test_without_a_ridge_it_is_the_projection_on_the_rows_of_a():
    x, w = random_rows(), ring()
    mixed = mix_once("lora_fair", x, w, ridge=0)
    for pair in LAYOUT.pairs:
        target = np.einsum("ij,jok->iok", w, (b_view(x, pair) @ a_view(x, pair)).numpy())
        rows = np.linalg.qr(a_view(mixed, pair).numpy().transpose(0, 2, 1))[0]
        np.testing.assert_allclose(b_view(mixed, pair) @ a_view(mixed, pair), target @ rows @ rows.transpose(0, 2, 1), atol=1e-10)


def test_between_the_projection_and_plain_averaging():
    x = drifted()
    steps = [errors("lora_fair", x, ring(), ridge=ridge) for ridge in (0.0, 0.1, 1.0, 100.0)] + [errors("lora", x, ring())]
    for closer, farther in zip(steps, steps[1:], strict=False):
        assert (closer < farther).all()
    torch.testing.assert_close(mix_once("lora_fair", x, ring(), ridge=1e12), mix_once("lora", x, ring()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_an_a_of_deficient_rank(ridge):
    x = random_rows()
    for pair in LAYOUT.pairs:
        a_view(x, pair)[:, 1] = a_view(x, pair)[:, 0]
    mixed = mix_once("lora_fair", x, ring(), ridge=ridge)
    assert mixed.isfinite().all() and product(mixed).norm() < 2 * product(x).norm()
    assert (errors("lora_fair", x, ring(), ridge=ridge) <= errors("lora", x, ring()) + 1e-9).all()


@pytest.mark.parametrize("ridge", [-1, True, "much", float("inf")])
def test_bad_values_are_refused(ridge):
    with pytest.raises(ValueError, match="method.ridge = .* is not allowed; allowed: a number from 0"):
        build("lora_fair", LAYOUT, ridge=ridge)
