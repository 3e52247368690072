"""What only a GPU can show; `bash benchmarks/gpu.sh` runs these on one. Without one they skip, and what they check is held on the CPU
by test_batched.py, as far as it can be."""

import threading
import warnings

import pytest
import tiny_runs
import torch
from rules_on_rows import METHODS, Peer0

from dfl.adapters.batched import cholesky_qr, jacobi_svd
from dfl.run.train import train
from dfl.store.checkpoints import latest
from dfl.transport import frames, wire
from dfl.transport.aside import Aside
from dfl.transport.frames import Label
from dfl.transport.packet import Packet
from dfl.transport.seats import agree_on_wire, seat_of

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_rule_mixes_as_on_the_cpu(name):
    for one, other in zip(Peer0(name, 2, GPU).mix(), Peer0(name, 2).mix(), strict=True):
        assert one.device.type == "cuda"
        assert torch.allclose(one.cpu(), other, rtol=0, atol=1e-4 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("size", [(64, 8), (1024, 48), (4096, 96)])
def test_factors_of_matrices_are_orthonormal_and_nothing_is_waited_for(size):
    x = torch.randn(16, *size, device=GPU)
    x[1], x[2, :, 1:] = 0, x[2, :, :1]
    core = x[:, :size[1]].double()
    jacobi_svd(core)  # what is made once is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            q, r = cholesky_qr(x)
            u, s, vh = jacobi_svd(core)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    one = torch.eye(size[1], dtype=torch.float64, device=GPU)
    for m in (q, u, vh.mT):
        assert float((m.mT @ m - one).abs().max()) < 1e-12
    assert torch.allclose(q @ r, x.double(), atol=1e-6) and torch.allclose((u * s[:, None]) @ vh, core, atol=1e-9)


@pytest.mark.parametrize("fields", [{}, {"train__executor": "sequential"}, {"method": "decaf"}, {"lora__start": "pissa"}], ids=str)
def test_a_run_ends_near_that_of_the_cpu(tmp_path, fields):
    folder, rows = tiny_runs.make_folder(tmp_path), []
    for device in ("cpu", "cuda"):
        config = tiny_runs.make_config(folder / "bert", folder / "data.csv", tmp_path / device, device=device, train__autocast="off",
                                       train__rounds=2, train__optimizer="sgd", train__lr=0.5, train__clip=None, model__head_std=0.5,
                                       **fields)
        assert train(config) == 0
        rows.append(tiny_runs.rows_of(latest(tmp_path / device), 4).cpu())
    apart = (rows[0] - rows[0].mean(0)).abs().max()  # what the peers have learnt for themselves
    assert apart > 0 and (rows[0] - rows[1]).abs().max() < 1e-2 * apart


def test_a_process_on_a_gpu_of_its_own_takes_nccl():
    seat = seat_of(GPU)
    assert seat.gpu and agree_on_wire("auto", [seat, seat._replace(gpu="another")]) == ("nccl" if seat.nccl else "gloo", "")


def test_messages_are_copied_beside_the_work_of_the_callers_stream():
    """A frame is filled and read again while that is busy; behind that it has the numbers that came."""
    row, launched, label = torch.randn(300_001, device=GPU), threading.Event(), Label("exchange", 0, 0, 0)
    packet = Packet({"A": row.view(torch.uint8)}, {"A": len(row)}, {})
    busy = torch.cuda.Event()

    def there_and_back():
        launched.wait()
        draft = wire.draft([wire.Entry(0, packet)])
        frame = torch.empty(draft.size, dtype=torch.uint8, pin_memory=True)
        wire.fill(frame, draft)
        torch.cuda.current_stream(GPU).synchronize()
        inside = frames.contents(frames.seal(frame, label), len(frame), label)
        (entry,) = wire.Reader().read(inside, GPU)
        return entry.packet, busy.query()

    aside = Aside(GPU, lambda made: made[0].payload.values())
    for cycles in (1000, 2 * 10**9):  # memory is asked for by the first, which may wait for all that runs
        launched.clear()
        begun = aside.begin(there_and_back)
        torch.cuda._sleep(cycles)
        busy.record()
        launched.set()
        found, ended_before = begun()
    assert not ended_before
    assert torch.equal(found.payload["A"].view(torch.float32), row)
    aside.end()
