"""Low-rank products without ever forming one: compact QR/SVD of weighted sums, Gram tables, rotations into a common frame.

A product is kept as its two thin factors: left (..., O, M), right (..., M, I). All functions take any leading batch. Cores of the
size of ranks are decomposed in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.batched import batched, cholesky_qr, svd

SPLITS = ("balanced", "left")
CRITERIA = ("A", "B", "joint")
# a singular direction below this fraction of the largest is numerically null in float32
_NULL = 1e-6
# rows up to which a product takes less time than its pieces
_SMALL = 64
# below this the nearest orthogonal matrix hangs on rounding errors
_SINGULAR = 1e-3


class Truncated(NamedTuple):
    """The best rank-r approximation U diag(S) Vh, all M singular values, and the Frobenius norm of what was cut."""

    u: Tensor  # (..., O, R)
    s: Tensor  # (..., R)
    vh: Tensor  # (..., R, I)
    spectrum: Tensor  # (..., min(M, O, I)), descending
    error: Tensor  # (...)


def truncate(left: Tensor, right: Tensor, rank: int) -> Truncated:
    """Best rank-`rank` approximation of left @ right (Eckart–Young) by two thin QRs and the SVD of an M x M core.

    left (..., O, M), right (..., M, I) -> u (..., O, R), s (..., R), vh (..., R, I), in the type of `left`.
    2 (O + I) M² + 4 (O + I) M R + ~20 M³ flops instead of O(O I min(O, I)). The core is decomposed in float64. Signs are fixed (the
    largest entry of each right vector is positive), so that two runs agree. Where the core is smaller than `rank`, zero
    singular values and zero vectors are appended.
    """
    left_qr, right_qr = _thin_qr(left), _thin_qr(right.mT)
    u, s, vh = svd(left_qr.r.double() @ right_qr.r.double().mT)
    kept = min(rank, s.shape[-1])
    error = s[..., kept:].square().sum(-1).sqrt()
    v = right_qr.times(vh[..., :kept, :].mT)
    sign = column_signs(v)
    u, vh = left_qr.times(u[..., :kept] * sign), (v * sign).mT
    if kept < rank:
        u = torch.nn.functional.pad(u, (0, rank - kept))
        vh = torch.nn.functional.pad(vh, (0, 0, 0, rank - kept))
    spectrum = s
    s = torch.nn.functional.pad(s[..., :kept], (0, rank - kept))
    dtype = left.dtype
    return Truncated(u, s.to(dtype), vh, spectrum.to(dtype), error.to(dtype))


def column_signs(v: Tensor) -> Tensor:
    """(..., 1, R) of ones and minus ones that make the largest entry of every column of v (..., I, R) positive."""
    return torch.where(v.gather(-2, v.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0).to(v)


class _Householder(NamedTuple):
    """A thin QR whose Q (..., O, K) stays as K reflections: making it costs as much again as the rest."""

    reflectors: Tensor
    tau: Tensor  # (..., K), K = min(O, M)
    r: Tensor  # (..., K, M)

    def times(self, core: Tensor) -> Tensor:
        """Q @ core: (..., O, R) in the type of Q for a core (..., K, R)."""
        num, size = self.tau.shape[-1], self.reflectors.shape[-2]
        padded = torch.nn.functional.pad(core.to(self.tau), (0, 0, 0, size - num))
        return torch.ormqr(self.reflectors[..., :num], self.tau, padded)


class _Explicit(NamedTuple):
    """A thin QR whose Q (..., O, K) is there, in float64, so that it does not depend on how a GPU rounds float32 products."""

    q: Tensor
    r: Tensor  # (..., K, M)
    dtype: torch.dtype

    def times(self, core: Tensor) -> Tensor:
        return (self.q @ core.double()).to(self.dtype)


def _thin_qr(matrix: Tensor) -> _Householder | _Explicit:
    if batched(matrix):
        if matrix.shape[-2] <= matrix.shape[-1]:  # its columns fill the space
            return _Explicit(torch.eye(matrix.shape[-2], dtype=torch.float64, device=matrix.device), matrix.double(), matrix.dtype)
        return _Explicit(*cholesky_qr(matrix), matrix.dtype)
    reflectors, tau = torch.geqrf(matrix)
    return _Householder(reflectors, tau, reflectors[..., :tau.shape[-1], :].triu())


def energy_rank(spectrum: Tensor, tau: float) -> Tensor:
    """The smallest p with sum_{l<=p} S_l² >= tau sum_l S_l²: (...) for spectrum (..., M), descending; 0 where all of it is zero.

    Decided by the tail, which loses no digits: with tau = 1 every direction that is not exactly zero is kept.
    """
    energy = spectrum.double().square()
    tail = energy.flip(-1).cumsum(-1).flip(-1)  # what is lost when only the directions before this one are kept
    return (tail > (1 - tau) * tail[..., :1]).sum(-1)


def cut(svd: Truncated, ranks: Tensor) -> Truncated:
    """The leading `ranks` (...) directions of each product of the batch; the others become zeros and count as error."""
    kept = torch.arange(svd.s.shape[-1], device=svd.s.device) < ranks[..., None]
    lost = torch.where(kept, torch.zeros_like(svd.s), svd.s).square().sum(-1)
    return svd._replace(u=svd.u * kept[..., None, :], s=svd.s * kept, vh=svd.vh * kept[..., None],
                        error=(svd.error.square() + lost).sqrt())


def refactor(svd: Truncated, own_a: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """Factors A (..., R, I), B (..., O, R) with B A = U S V^T. A null direction keeps a row in A and a zero column in B.

    balanced: B = U S^1/2, A = S^1/2 V^T; left: B = U S, A = V^T. In a null direction a balanced split would leave zeros on
    both sides, which no gradient ever revives; there A gets the right vector at the mean row norm of the peer's own A,
    which changes no product and stays trainable.
    """
    s, vh = svd.s, svd.vh
    null = s <= _NULL * s[..., :1]
    size = own_a.square().sum(-1).mean(-1, keepdim=True).sqrt().expand_as(s)
    root = s.sqrt() if split == "balanced" else torch.ones_like(s)
    left = torch.where(null, torch.zeros_like(s), s / root.clamp_min(torch.finfo(s.dtype).tiny))
    right = torch.where(null, size if split == "balanced" else torch.ones_like(s), root)
    return right[..., None] * vh, svd.u * left[..., None, :]


def weighted_sum(weights: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j w_j B_j A_j as (left (..., O, J R), right (..., J R, I)), exact, nothing multiplied out.

    weights (J), a (J, ..., R, I), b (J, ..., O, R).
    """
    scaled = b * weights.view(-1, *[1] * (b.dim() - 1)).to(b)
    left = scaled.movedim(0, -2).flatten(-2)
    right = a.movedim(0, -3).flatten(-3, -2)
    return left, right


class Grams(NamedTuple):
    """All inner products among J pairs: b[u, x, a, y] = <column x of B_u, column y of B_a>, a the same of the rows of A.

    Both (..., J, R, J, R) float64. Every Frobenius quantity of combinations of these pairs follows without their long sides.
    """

    b: Tensor
    a: Tensor

    def of(self, some: Tensor) -> "Grams":
        """The tables of some of the pairs, by their numbers (K,)."""
        return Grams(*(table.index_select(-4, some).index_select(-2, some) for table in self))


def gram_tables(a: Tensor, b: Tensor) -> Grams:
    """The tables of pairs a (J, ..., R, I), b (J, ..., O, R): two GEMMs of (J R) x (J R)."""
    num, rank = a.shape[0], a.shape[-2]
    columns, rows = _side_by_side(b.mT), _side_by_side(a)
    return Grams(*((f @ f.mT).unflatten(-1, (num, rank)).unflatten(-3, (num, rank)) for f in (columns, rows)))


def products(grams: Grams) -> Tensor:
    """<B_j A_j, B_l A_l>_F: (..., J, J)."""
    return (grams.b * grams.a).sum((-3, -1))


def inner_products(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Tensor:
    """<B_j A_j, B'_k A'_k>_F (..., J, K) of pairs a (J, ..., R, I), b (J, ..., O, R) and others (K, ..., R', I), (K, ..., O, R')."""
    columns, rows = (_side_by_side(one) @ _side_by_side(other).mT for one, other in ((b.mT, other_b.mT), (a, other_a)))
    sizes = (len(a), a.shape[-2]), (len(other_a), other_a.shape[-2])
    return (columns * rows).unflatten(-1, sizes[1]).sum(-1).unflatten(-2, sizes[0]).sum(-2)


def product_gram(a: Tensor, b: Tensor) -> Tensor:
    """<B_j A_j, B_l A_l>_F (..., J, J) of pairs a (J, ..., R, I), b (J, ..., O, R), each pair once where they are large."""
    num = len(a)
    if num == 1 or num * a.shape[-2] <= _SMALL:
        return inner_products(a, b, a, b)
    first, second = slice(num // 2), slice(num // 2, num)
    across = inner_products(a[first], b[first], a[second], b[second])
    return torch.cat([torch.cat([product_gram(a[first], b[first]), across], -1),
                      torch.cat([across.mT, product_gram(a[second], b[second])], -1)], -2)


def _side_by_side(rows: Tensor) -> Tensor:
    """The rows (J, ..., R, I) of J matrices below each other, float64: (..., J R, I)."""
    return rows.double().movedim(0, -3).flatten(-3, -2)


def squared_norms(a: Tensor, b: Tensor) -> Tensor:
    """||B A||_F² (...) of pairs a (..., R, I), b (..., O, R)."""
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1))


def inner(table: Tensor) -> Tensor:
    """<F_j, F_l>_F of the factors behind one table (..., J, R, J, R): (..., J, J)."""
    return torch.einsum("...uxax->...ua", table)


def combined(table: Tensor, coefficients: Tensor) -> Tensor:
    """The R x R Gram matrix of sum_u c_u F_u: (..., R, R) for one table and coefficients (..., J)."""
    return torch.einsum("...u,...a,...uxay->...xy", coefficients, coefficients, table)


def factor_error(grams: Grams, p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """||(sum_u p_u B_u)(sum_v q_v A_v) - sum_j w_j B_j A_j||_F²: (...) for coefficients (..., J), from the tables alone."""
    mean = (combined(grams.b, p) * combined(grams.a, q)).sum((-2, -1))
    half_b = torch.einsum("...u,...uxay->...axy", p, grams.b)
    half_a = torch.einsum("...v,...vxay->...axy", q, grams.a)
    mixed = torch.einsum("...a,...axy,...axy->...", weights, half_b, half_a)
    target = torch.einsum("...u,...ua,...a->...", weights, products(grams), weights)
    return (mean - 2 * mixed + target).clamp_min(0)


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    """All of left @ right (..., min(M, O, I)), descending, for left (..., O, M) and right (..., M, I): `truncate` without its
    vectors, which take most of its time."""
    core = _triangle(left.double()) @ _triangle(right.double().mT).mT
    return svd(core)[1] if batched(core) else torch.linalg.svdvals(core)


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """||left @ right||_F (...) by two thin QRs: no digit is lost where the terms of a sum cancel."""
    return torch.linalg.matrix_norm(_triangle(left.double()) @ _triangle(right.double().mT).mT)


def _triangle(matrix: Tensor) -> Tensor:
    return _thin_qr(matrix).r if batched(matrix) else torch.linalg.qr(matrix, mode="r").R


def procrustes(cross: Tensor, strength: float = 1.0) -> Tensor:
    """The rotation R (..., R, R) nearest to `cross`, turned by only a part of its angles where `strength` < 1: float64.

    cross = X X_ref^T for rows X (R, I): R minimises ||R^T X - X_ref||_F; X^T X_ref for columns: ||X R - X_ref||_F.
    Where cross is rank-deficient the rest is turned as little as possible: cross = 0 gives the identity.
    strength = 1: any orthogonal matrix. Below it: the proper rotation (the weakest direction is flipped where det R < 0) with every
    angle theta changed to atan2(strength sin theta, 1 - strength + strength cos theta), the polar factor of
    (1 - strength) I + strength R; where that is nearly singular (theta near pi), R itself.
    """
    u, s, vh = svd(cross.double())
    null = s <= _NULL * s[..., :1]
    if batched(null) or null.any():
        inside = null[..., :, None] & null[..., None, :]
        inner = torch.where(inside, u.mT @ vh.mT, torch.diag_embed((~null).double()))
        vh = _polar(inner)[0] @ vh
    rotation = u @ vh
    if strength == 1:
        return rotation
    improper = torch.linalg.det(rotation) < 0
    last = torch.where(improper, -2.0, 0.0)[..., None, None]
    rotation = rotation + last * u[..., :, -1:] @ vh[..., -1:, :]
    soft, smallest = _polar((1 - strength) * torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
                            + strength * rotation)
    return torch.where((smallest < _SINGULAR)[..., None, None], rotation, soft)


def _polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal matrix nearest to a square one, and the latter's smallest singular value (...)."""
    u, s, vh = svd(matrix)
    return u @ vh, s[..., -1]


def align(a: Tensor, b: Tensor, reference_a: Tensor, reference_b: Tensor, criterion: str = "joint",
          strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The pair turned into the frame of a reference: (R^T A, B R, R) with the same product B A.

    a (..., R, I), b (..., O, R). criterion: what R brings close, A, B, or both, each measured by the size of its reference
    (joint). The optimiser's first moments turn with their factors: R^T m_A, m_B R.
    """
    rotation = procrustes(_cross(a, b, reference_a, reference_b, criterion), strength).to(a.dtype)
    return rotation.mT @ a, b @ rotation, rotation


def _cross(a: Tensor, b: Tensor, reference_a: Tensor, reference_b: Tensor, criterion: str) -> Tensor:
    """(..., R, R): what `procrustes` takes."""
    of_a = (a.double(), reference_a.double())
    of_b = (b.double().mT, reference_b.double().mT)
    if criterion != "joint":
        x, reference = of_a if criterion == "A" else of_b
        return x @ reference.mT
    return sum(x @ reference.mT / _positive(reference.square().sum((-2, -1), keepdim=True)) for x, reference in (of_a, of_b))


def _positive(value: Tensor) -> Tensor:
    """What may be divided by: ones where `value` is zero."""
    return torch.where(value > 0, value, torch.ones_like(value))
