"""Spectral-normalised critics under DistributedDataParallel: gloo on the CPU, one and two processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

WORKER = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = {paths!r}
from test_spectral_norm import critics, group_spectral_norm, hinge_step
rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{{port}}", rank=rank, world_size=world)
results = {{}}
for how in ("torch", "layers", "forward", "step"):
    theirs, ours = critics()
    model = theirs if how == "torch" else ours
    if how in ("forward", "step"):
        group_spectral_norm(model, how)
    parallel = DistributedDataParallel(model, broadcast_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(4):
        batches = torch.randn(2, 4, 6, 32, 32, generator=generator)
        real, fake = batches[:, rank * 4 // world : (rank + 1) * 4 // world]
        losses.append(hinge_step(parallel, optimizer, real, fake))
    results[how] = (losses, model.state_dict())
torch.save(results, f"{{out}}/{{world}}-{{rank}}.pt")
dist.destroy_process_group()
"""


def run_distributed(world: int, folder: Path) -> list[dict[str, tuple[list[float], dict[str, Tensor]]]]:
    """Per rank: for torch's layers and each way of ours, the losses and the final state of four steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).resolve().parent
    script = WORKER.format(paths=[str(here), str(here.parent)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(world), str(port), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


def test_two_processes_two_forwards_per_step(tmp_path: Path) -> None:
    """Ranks agree in every bit, and the numbers are those of torch's layers under DDP and of one process."""
    first, second = run_distributed(2, tmp_path)
    (single,) = run_distributed(1, tmp_path)
    for how, (losses, state) in first.items():
        torch.testing.assert_close(state, second[how][1], rtol=0, atol=0, msg=how)
        torch.testing.assert_close(state, single[how][1], rtol=1e-3, atol=1e-5)
        if how != "step":
            assert losses == pytest.approx(first["torch"][0], rel=1e-4)
            torch.testing.assert_close(state, first["torch"][1], rtol=1e-3, atol=1e-5)
