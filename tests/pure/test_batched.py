"""Linear algebra for GPUs, on the CPU: the bounds of LAPACK's, every rule's mix as on the CPU, and what the host asks for."""

import math

import pytest
import torch
from reads import Reads
from rules_on_rows import METHODS, Peer0

import topologies
from dfl import methods
from dfl.adapters.batched import as_on_a_gpu, cholesky_qr, eigh, jacobi_svd, least_squares, qr, svd
from dfl.adapters.layout import pack
from dfl.adapters.lowrank import procrustes, product_norm, truncate
from dfl.engine.gossip import Gossip
from dfl.transport import InProcess

SIZES = [(64, 8), (513, 48), (40, 39), (24, 24)]
KINDS = ["1", "1e4", "1e8", "1e12", "scaled", "zero columns", "zero", "rank deficient", "repeated"]


def matrices(kind: str, rows: int, columns: int, dtype: torch.dtype, num: int = 3) -> torch.Tensor:
    """(num, rows, columns): of a condition, with orthogonal columns of very different lengths, or with dependent columns."""
    generator = torch.Generator().manual_seed(rows + columns)
    u, v = (torch.linalg.qr(torch.randn(num, size, columns, generator=generator, dtype=torch.float64)).Q for size in (rows, columns))
    if kind[0].isdigit():
        return ((u * torch.logspace(0, -math.log10(float(kind)), columns, dtype=torch.float64)) @ v.mT).to(dtype)
    x = u @ v.mT
    if kind == "scaled":
        return (x * torch.logspace(0, -12, columns, dtype=torch.float64)).to(dtype)
    if kind == "zero":
        return torch.zeros_like(x).to(dtype)
    if kind == "zero columns":
        x[..., ::3] = 0
    if kind == "rank deficient":
        x[..., columns // 2:] = x[..., :columns // 2] @ torch.randn(num, columns // 2, columns - columns // 2, generator=generator,
                                                                    dtype=torch.float64)
    if kind == "repeated":
        x[..., 1:] = x[..., :1]
    return x.to(dtype)


def errors(x: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> tuple[float, float]:
    """The largest ||Q^T Q - I||_F of a batch, and the largest ||x - Q R e|| / ||x|| of a column."""
    x, q, r = (one.double() for one in (x, q, r))
    length = torch.linalg.vector_norm(x, dim=-2)
    off = torch.linalg.vector_norm(q @ r - x, dim=-2)
    assert not off[length == 0].any()
    return (float(torch.linalg.matrix_norm(q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).max()),
            float((off / length.clamp_min(1e-300)).max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_cholesky_qr_keeps_the_bounds_of_householders(size, kind, dtype):
    x, bound = matrices(kind, *size, dtype), 5 * size[1] ** 0.5 * torch.finfo(dtype).eps
    assert max(errors(x, *torch.linalg.qr(x))) < bound
    with as_on_a_gpu():
        q, r = qr(x)
    assert q.dtype == dtype and not r.tril(-1).any()
    assert max(errors(x, q, r)) < bound
    assert max(errors(x, *cholesky_qr(x))) < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2), (24, 24), (49, 49), (16, 40), (40, 16)])
def test_jacobi_svd_is_lapacks(size, kind):
    wide = size[0] < size[1]
    x = matrices(kind, max(size), min(size), torch.float64)
    x = x.mT if wide else x
    u, s, vh = jacobi_svd(x)
    expected, scale = torch.linalg.svdvals(x), float(torch.linalg.matrix_norm(x, 2).max())
    assert (s - expected).abs().max() <= 1e-13 * scale and (s.diff() <= 0).all()
    assert torch.allclose((u * s[..., None, :]) @ vh, x, rtol=0, atol=1e-13 * scale)
    for side in (u, vh.mT):
        assert torch.allclose(side.mT @ side, torch.eye(min(size), dtype=torch.float64).expand(3, -1, -1), rtol=0, atol=1e-13)


def test_what_is_not_finite_stays_so_and_raises_nothing():
    x = torch.full((2, 8, 4), torch.nan)
    assert not any(found.isfinite().any() for found in (*cholesky_qr(x), jacobi_svd(x)[1]))


def test_eigenvectors_and_least_squares_are_lapacks():
    x = matrices("1e4", 40, 12, torch.float64)
    target = torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(x.mT @ x)
    expected = torch.linalg.lstsq(x, target).solution
    with as_on_a_gpu():
        found, basis = eigh(x.mT @ x)
        along = (basis.mT @ vectors).abs().diagonal(dim1=1, dim2=2)
        assert torch.allclose(found, values, rtol=0, atol=1e-14) and torch.allclose(along, torch.ones_like(along), atol=1e-6)
        assert torch.allclose(least_squares(x, target), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [12, 48, 90])
def test_truncation_is_that_of_the_cpu(slots, dtype):
    """Also with more slots than a side of the layer is long, products of zero and dependent factors."""
    generator = torch.Generator().manual_seed(slots)
    left, right = (torch.randn(4, *size, generator=generator, dtype=dtype) for size in ((64, slots), (slots, 40)))
    left[1], right[2], left[3, :, 1:] = 0, 0, left[3, :, :1]
    plain = truncate(left, right, 8)
    with as_on_a_gpu():
        found = truncate(left, right, 8)
        assert torch.allclose(product_norm(left, right), torch.linalg.matrix_norm((left @ right).double()), rtol=1e-5)
    near = 1e-4 if dtype == torch.float32 else 1e-12
    for one, other in ((found.s, plain.s), (found.spectrum, plain.spectrum), (found.error, plain.error),
                       ((found.u * found.s[:, None]) @ found.vh, (plain.u * plain.s[:, None]) @ plain.vh)):
        assert one.dtype == dtype and torch.allclose(one, other, rtol=0, atol=near)
    assert not found.spectrum[1:3].any()  # what is zero is exactly so, which rules ask for


def test_rotations_of_deficient_frames_turn_what_is_left_as_little_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    cross = torch.randn(5, 6, 6, generator=generator)
    cross[1], cross[2, 3:], cross[3], cross[4, 5] = 0, 0, torch.eye(6), cross[4, 0]
    for strength, of in ((1.0, cross), (0.4, cross[[0, 1, 3, 4]])):  # which null direction is flipped in part nobody says
        plain = procrustes(of, strength)
        with as_on_a_gpu():
            assert torch.allclose(procrustes(of, strength), plain, atol=1e-6), strength


@pytest.mark.parametrize("name", METHODS)
def test_every_rule_mixes_as_on_the_cpu(name):
    plain = Peer0(name, layers=2).mix()
    with as_on_a_gpu():
        found = Peer0(name, layers=2).mix()
    for one, other in zip(found, plain, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4 * max(1.0, float(other.abs().max())))


# what a rule asks for beside nothing: ranks that it prunes; which numbers its message has, of masks that the host has made; and
# torch's optimiser counts its steps on the host
ASKED = {"hetlora pruning": 5, "plora": 5, "salf": 2, "task_bank": 4, "flora_na adamw": 12}


@pytest.mark.parametrize("name", METHODS)
def test_the_host_asks_for_no_number_in_a_loop(name):
    """On a GPU it would wait for all that has been begun. More layers, and more sweeps of a solver, ask for no more."""
    asked = []
    for layers in (2, 5):
        peer = Peer0(name, layers)
        with as_on_a_gpu():
            peer.mix()  # what is made once is made
            with Reads() as reads:
                peer.rule.send(peer.x, peer.state, peer.round)
                peer.mix()
        asked.append(reads.found)
    assert len(asked[0]) == len(asked[1]) == ASKED.get(name, 0), asked


@pytest.mark.parametrize("name", ["lora", "decaf", "lora_fair"])
def test_a_round_of_gossip_asks_once_for_all_hosted_peers(name):
    """Whether their messages are finite."""
    layers = {str(k): (torch.randn(6, 4, 20), torch.randn(6, 20, 4)) for k in range(3)}
    layout, x = pack(layers)
    method = methods.build(name, methods.Context(layout))
    gossip = Gossip(method, layout, topologies.build("ring", 6), InProcess(), range(6), x)
    before = x.clone()
    with as_on_a_gpu(), Reads() as reads:
        gossip.round(0, x)
    assert reads.found == ["tolist"] and not torch.equal(x, before)


def test_what_the_host_asks_for_is_seen():
    x = torch.ones(4, dtype=torch.float64)
    with Reads() as reads:
        if (x.sum() > 0) and float(x[0]) and x.max().item() and x.tolist() and x[x > 2].numel() == 0:
            svd(x.diag())
        torch.tensor([3]).tolist()  # whole numbers of a message are the host's
    assert len(reads.found) >= 5
