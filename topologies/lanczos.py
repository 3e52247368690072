"""Extreme eigenvalues of large sparse matrices; dense ones while that is cheaper. scipy only where it is needed."""

from __future__ import annotations

import numpy as np

# Up to here LAPACK on the dense matrix is faster than, or as fast as, Lanczos, and exact.
DENSE = 800


def scipy_sparse():
    """scipy.sparse with its eigensolvers, or an error that says how to get it."""
    try:
        import scipy.sparse
        import scipy.sparse.linalg
    except ImportError:
        raise ImportError(f"more than {DENSE} peers need scipy here: pip install 'dfl[topologies]'") from None
    return scipy.sparse


def laplacian_extremes(links) -> tuple[float, float]:
    """(lambda_2(L), lambda_n(L)) of a connected undirected graph."""
    if links.num_peers <= DENSE:
        eigenvalues = np.linalg.eigvalsh(links.laplacian())
        return float(eigenvalues[1]), float(eigenvalues[-1])
    sparse = scipy_sparse()
    n, ones = links.num_peers, np.ones(len(links.sender))
    A = sparse.csr_matrix((ones, (links.receiver, links.sender)), shape=(n, n))
    L = sparse.diags(links.in_degree.astype(np.float64)) - A
    largest = float(sparse.linalg.eigsh(L, k=1, which="LA", return_eigenvectors=False)[0])
    return nearest_to(L, 0.0, shift=-1e-3 * largest, k=2)[1], largest


def nearest_to(matrix, value: float, shift: float, k: int) -> list[float]:
    """The k eigenvalues of a symmetric sparse matrix next to ``value``, by Lanczos on (matrix - (value + shift) I)^-1."""
    sparse = scipy_sparse()
    found = sparse.linalg.eigsh(matrix.tocsc(), k=k, sigma=value + shift, which="LM", return_eigenvectors=False)
    return sorted(float(x) for x in found)
