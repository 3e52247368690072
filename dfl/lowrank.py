"""Low-rank products without ever forming one: compact QR/SVD of weighted sums, and Gram tables.

A product is kept as its two thin factors: left (..., O, M), right (..., M, I). All functions take any leading batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
    Cost O((O + I) M²) instead of O(O I min(O, I)). The core is decomposed in float64. Signs are fixed (the
    largest entry of each right vector is positive), so that two runs agree. Where the core is smaller than `rank`, zero
    singular values and zero vectors are appended.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    core = r_left.double() @ r_right.double().mT
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, s.shape[-1])
    error = s[..., kept:].square().sum(-1).sqrt()
    u = q_left.double() @ u[..., :kept]
    vh = vh[..., :kept, :] @ q_right.double().mT
    u, vh = _fix_signs(u, vh)
    if kept < rank:
        u = torch.nn.functional.pad(u, (0, rank - kept))
        vh = torch.nn.functional.pad(vh, (0, 0, 0, rank - kept))
    spectrum = s
    s = torch.nn.functional.pad(s[..., :kept], (0, rank - kept))
    dtype = left.dtype
    return Truncated(u.to(dtype), s.to(dtype), vh.to(dtype), spectrum.to(dtype), error.to(dtype))


def _fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    top = vh.gather(-1, vh.abs().argmax(-1, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(vh.dtype)
    return u * sign.mT, vh * sign


def weighted_sum(weights: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j w_j B_j A_j as (left (..., O, J R), right (..., J R, I)), exact, nothing multiplied out.

    weights (J), a (J, ..., R, I), b (J, ..., O, R).
    """
    scaled = b * weights.view(-1, *[1] * (b.dim() - 1)).to(b)
    left = scaled.movedim(0, -2).flatten(-2)
    right = a.movedim(0, -3).flatten(-3, -2)
    return left, right


def product_gram(a: Tensor, b: Tensor) -> Tensor:
    """K[j, l] = <B_j A_j, B_l A_l>_F for pairs a (J, L, R, I), b (J, L, O, R), summed over the L layers: (J, J) float64.

    tr(A_j^T B_j^T B_l A_l) = <B_j^T B_l, A_j A_l^T>: two (J R) x (J R) tables, no O x I matrix.
    """
    num, layers, rank, _ = a.shape
    a = a.double().transpose(0, 1).flatten(1, 2)
    b = b.double().transpose(0, 1).transpose(-1, -2).flatten(1, 2)
    table = (a @ a.mT) * (b @ b.mT)
    return table.view(layers, num, rank, num, rank).sum((0, 2, 4))
