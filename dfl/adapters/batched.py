"""Linear algebra of many small matrices at once, for GPUs: no loop over the batch, no number read back by the host.

On a GPU torch takes one matrix of a batch after the other, for a QR of more than 256 rows and for an SVD or eigenvectors of more
than 32, and reads back whether each went well. Here all are done by products, Cholesky factors and rotations of the whole batch. On
a CPU, where LAPACK does better, the functions without a trailing name for their method use torch's own, and bits stay as they are.
All work is in float64.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_forced = False
# what a column is changed by, as a share of its length, so that no two of them are dependent: below what the type resolves
_NOISE = {torch.float64: 4 * torch.finfo(torch.float64).eps, torch.float32: 0.01 * torch.finfo(torch.float32).eps}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Tensors on a CPU go the way of those on a GPU meanwhile; for tests and benchmarks."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def batched(x: Tensor) -> bool:
    """Whether x goes the way of GPUs: there a loop must not ask for the value of a tensor, and no error is looked for."""
    return x.is_cuda or _forced


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR of (..., m, n), m >= n: Q (..., m, n), R (..., n, n) upper triangular, in the type of the matrix."""
    if not batched(matrix):
        return torch.linalg.qr(matrix)
    q, r = cholesky_qr(matrix)
    return q.to(matrix.dtype), r.triu().to(matrix.dtype)


def svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., p, k), S (..., k) descending, Vh (..., k, q) of cores (..., p, q) of the size of ranks, k = min(p, q)."""
    return jacobi_svd(core) if batched(core) else torch.linalg.svd(core, full_matrices=False)


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of positive semi-definite matrices."""
    if not batched(gram):
        return torch.linalg.eigh(gram)
    u, s, _ = jacobi_svd(gram)
    return s.flip(-1), u.flip(-1)


def solve(matrix: Tensor, target: Tensor) -> Tensor:
    """The solutions of square systems; on a GPU not finite where one is singular, and no error."""
    return torch.linalg.solve_ex(matrix, target).result if batched(matrix) else torch.linalg.solve(matrix, target)


def least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """argmin_C ||X C - Z||: (..., n, k) for X (..., m, n) of full rank, m >= n, and Z (..., m, k)."""
    if not batched(matrix):
        return torch.linalg.lstsq(matrix, target).solution
    q, r = qr(matrix)
    return torch.linalg.solve_triangular(r, q.mT @ target, upper=True)


def uploaded(values: Sequence, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host where `like` is; the host does not wait until they are there."""
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def known(condition: Tensor) -> bool:
    """A condition that would end a loop early: False on a GPU, where asking costs more than what is left of the loop."""
    return not batched(condition) and bool(condition)


def cholesky_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., m, n) with orthonormal columns and R = Q^T X (..., n, n), float64, for X (..., m, n), m >= n, of any rank.

    Q <- Q C^-1 with the Cholesky factor C of Q^T Q, twice (CholeskyQR2), which needs columns that are not nearly dependent. So
    columns are scaled to one length, changed by less than their type resolves (a random direction each, the same for all of a batch)
    and orthogonalised once before with Q^T Q + s I, in float64 input twice (shifted CholeskyQR). Columns of zeros become such random
    directions; their column of R is zero. ||Q^T Q - I|| and, for each column, ||x - Q R e|| / ||x|| are of the order of rounding in
    the type of X. R is upper triangular up to the same; 4 m n² flops a pass, 3 or 4 passes.
    Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015 (ETNA 44); Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa 2018, arXiv 1809.11085.
    """
    noise = _NOISE.get(matrix.dtype, _NOISE[torch.float32])
    x = matrix.double()
    length = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    apart = _directions(x.shape[-2], x.shape[-1], x.device)
    q = torch.where(length == 0, apart, x / torch.where(length == 0, 1.0, length) + noise * apart)
    for shift in [True] * (2 if matrix.dtype == torch.float64 else 1) + [False, False]:
        q = _orthogonalised(q, shift)
    return q, q.mT @ x


def _orthogonalised(q: Tensor, shift: bool) -> Tensor:
    """Q C^-1 by a triangular solve, which leaves the space of the columns as it is."""
    gram = q.mT @ q
    if shift:
        size = 4 * q.shape[-1] * torch.finfo(q.dtype).eps * torch.linalg.matrix_norm(gram)
        gram.diagonal(dim1=-2, dim2=-1).add_(size[..., None])
    factor = torch.linalg.cholesky_ex(gram).L
    return torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)


def _directions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) of columns about 1 long, drawn where they are needed: no copy to a GPU."""
    generator = torch.Generator(device).manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float64) / rows ** 0.5


def jacobi_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a batch by one-sided Jacobi rotations, float64: U (..., p, k), S (..., k) descending, Vh (..., k, q).

    Two QRs first, of the core and of the transpose of its R, bring it near to a diagonal, however bad its condition. Then disjoint
    pairs of rows are made orthogonal together, in n - 1 steps a sweep that meet every pair, as many sweeps as matrices of that size
    are known to need. Singular values are right up to rounding of the largest; vectors of those that are zero are orthonormal as the
    others are. Demmel, Veselic 1992 (SIAM J. Matrix Anal. Appl. 13), Drmac, Veselic 2008 (SIAM J. Matrix Anal. Appl. 29); pairs as in
    Brent, Luk 1985 (SIAM J. Sci. Stat. Comput. 6).
    """
    if core.shape[-2] > core.shape[-1]:
        v, s, uh = jacobi_svd(core.mT)
        return uh.mT, s, v.mT
    core = core.double()
    order = torch.linalg.vector_norm(core, dim=-1).argsort(dim=-1, descending=True, stable=True)
    right, r = cholesky_qr(_rows(core, order).mT)
    left, r = cholesky_qr(r.mT)  # the core, in that order of rows, is left r right^T
    made, turned = _orthogonal_rows(r)
    s, largest = torch.linalg.vector_norm(turned, dim=-1).sort(dim=-1, descending=True, stable=True)
    u = left @ _rows(made, largest).mT
    return _rows(u, order.argsort(dim=-1)), s, (right @ cholesky_qr(_rows(turned, largest).mT)[0]).mT


def _rows(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.gather(-2, order[..., None].expand(matrix.shape))


def _orthogonal_rows(square: Tensor) -> tuple[Tensor, Tensor]:
    """J (..., n, n) orthogonal, and J X whose rows are orthogonal, for X (..., n, n)."""
    rows = square.shape[-1]
    even = rows + rows % 2  # a row of zeros more where their number is odd
    turned = torch.nn.functional.pad(square, (0, even, 0, even - rows))
    turned[..., rows:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    following = _following(even, square.device)
    for _ in range(_sweeps(even) * max(1, even - 1)):
        pairs = turned.unflatten(-2, (even // 2, 2))
        turned = (_rotations(pairs[..., :rows]) @ pairs).flatten(-3, -2)[..., following, :]
    return turned[..., :rows, rows:rows + rows], turned[..., :rows, :rows]


def _rotations(pairs: Tensor) -> Tensor:
    """(..., 2, 2) that make each pair of rows (..., 2, q) orthogonal, by the smaller of both angles."""
    gram = pairs @ pairs.mT
    # both zero: nothing to turn
    tangent = torch.nan_to_num(2 * gram[..., 0, 1] / (gram[..., 0, 0] - gram[..., 1, 1]), nan=0.0)
    angle = torch.atan(tangent) / 2
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))


def _sweeps(size: int) -> int:
    """Sweeps after which rows are orthogonal up to rounding, with one to spare."""
    return 1 if size <= 2 else 3 + (size - 1).bit_length()


@cache
def _following(size: int, device: torch.device) -> Tensor:
    """Who sits where in the next step: 0 stays, the others go around, so that after size - 1 steps all have met once."""
    seats = list(range(0, size, 2)) + list(range(size - 1, 0, -2))  # upper row from the left, lower row from the right
    comes = {seats[0]: seats[0]} | {seats[1 + (k + 1) % (size - 1)]: seats[1 + k] for k in range(size - 1)}
    return torch.tensor([comes[seat] for seat in range(size)]).to(device)
