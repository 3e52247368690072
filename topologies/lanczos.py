"""Extreme eigenvalues of large sparse matrices; dense ones while that is cheaper. scipy only where it is needed."""

from __future__ import annotations

import numpy as np

# Up to here LAPACK on the dense matrix is as fast as Lanczos, and exact to the last digits.
DENSE = 800
# Restarts of Lanczos before a factorisation is tried: enough for expanders, too few when eigenvalues crowd near 1.
RESTARTS = 200


def scipy_sparse():
    """scipy.sparse with its eigensolvers, or an error that says how to get it."""
    try:
        import scipy.sparse
        import scipy.sparse.linalg
    except ImportError:
        raise ImportError(f"spectra of more than {DENSE} peers need scipy: pip install 'dfl[topologies]'") from None
    return scipy.sparse


def to_csr(entries):
    """A sparse W as a scipy matrix."""
    n, ids = entries.links.num_peers, np.arange(entries.links.num_peers)
    place = np.concatenate([entries.links.receiver, ids]), np.concatenate([entries.links.sender, ids])
    return scipy_sparse().csr_matrix((np.concatenate([entries.weight, entries.diagonal]), place), shape=(n, n))


def laplacian_extremes(links) -> tuple[float, float]:
    """(lambda_2(L), lambda_n(L)) of a connected undirected graph."""
    if links.num_peers <= DENSE:
        eigenvalues = np.linalg.eigvalsh(links.laplacian())
        return float(eigenvalues[1]), float(eigenvalues[-1])
    sparse = scipy_sparse()
    n, ones = links.num_peers, np.ones(len(links.sender))
    A = sparse.csr_matrix((ones, (links.receiver, links.sender)), shape=(n, n))
    L = sparse.diags(links.in_degree.astype(np.float64)) - A
    largest = float(sparse.linalg.eigsh(L, k=1, which="LA", return_eigenvectors=False, v0=start(n))[0])
    return largest - second_largest(sparse.eye(n) * largest - L, largest), largest


def second_largest(matrix, trivial: float) -> float:
    """Second largest eigenvalue of a symmetric sparse matrix whose largest, ``trivial``, belongs to the constant vector."""
    return _extreme(matrix, trivial, "LA", trivial * (1 + 1e-6) + 1e-6)


def _extreme(matrix, trivial: float, which: str, outside: float) -> float:
    """An end of the spectrum with the constant vector taken out: Lanczos, else Lanczos on a shifted inverse."""
    linalg, n = scipy_sparse().linalg, matrix.shape[0]
    deflated = linalg.LinearOperator((n, n), matvec=lambda x: matrix @ x - trivial * x.mean(), dtype=np.float64)
    try:
        found = linalg.eigsh(deflated, k=1, which=which, maxiter=RESTARTS, v0=start(n), return_eigenvectors=False)
        return float(found[0])
    except linalg.ArpackNoConvergence:
        found = linalg.eigsh(matrix.tocsc(), k=2, sigma=outside, v0=start(n), return_eigenvectors=False)
        return float(min(found))  # next to the top: all but the trivial one; next to the bottom: the smallest


def start(n: int) -> np.ndarray:
    """The vector Lanczos starts from: fixed, so that results repeat, and with a share of every eigenvector."""
    return np.random.default_rng(0).standard_normal(n)


def sparse_slem(entries, symmetric: bool) -> float:
    """max |eig(W - J)| of a sparse W with row sums of one."""
    matrix, n = to_csr(entries), entries.links.num_peers
    if symmetric:
        second, bound = second_largest(matrix, 1.0), 2 * entries.diagonal.min() - 1  # Gershgorin: no eigenvalue below
        return second if -bound <= second else max(second, abs(_extreme(matrix, 1.0, "SA", bound - 1e-6)))
    linalg = scipy_sparse().linalg
    deflated = linalg.LinearOperator((n, n), matvec=lambda x: matrix @ x - x.mean(), dtype=np.float64)
    return float(np.abs(linalg.eigs(deflated, k=2, which="LM", v0=start(n), return_eigenvectors=False)).max())
