"""profile=true: where the time of a training step goes, by torch's profiler, over a few steps after the first ones.

profile.txt     time, FLOPs and kernels of a step, the share of what this device reaches in a matrix product, and the 25 kernels
                that take longest
profile.json.gz the trace, for chrome://tracing or ui.perfetto.dev
"""

import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from diffusion_cli.devices import Compute
from diffusion_cli.models import Network
from diffusion_cli.runs import Run, say

WAIT, WARM_UP, STEPS = 3, 2, 5  # compiled and settled after five


@contextmanager
def profiled(run: Run, network: nn.Module, batch: int, compute: Compute) -> Iterator[Callable[[], None]]:
    """A function to call after each step. batch: pictures in a step."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (compute.device.type == "cuda")
    seconds, began = list[float](), time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints its own beginning and end
    with profile(activities=activities, schedule=schedule(wait=WAIT, warmup=WARM_UP, active=STEPS, repeat=1)) as found:

        def tick() -> None:
            nonlocal began
            if len(seconds) >= WAIT + WARM_UP + STEPS:
                return
            if compute.device.type == "cuda":
                torch.cuda.synchronize(compute.device)
            seconds.append(time.perf_counter() - began)
            found.step()
            if len(seconds) == WAIT + WARM_UP + STEPS:
                found.stop()
                _write(run, found, sorted(seconds[-STEPS:])[STEPS // 2], network, batch, compute)
            began = time.perf_counter()

        yield tick
    if len(seconds) < WAIT + WARM_UP + STEPS:
        say(f"no profile: it is made of steps {WAIT + WARM_UP + 1} to {WAIT + WARM_UP + STEPS} after the start")


def _write(run: Run, found: profile, seconds: float, network: nn.Module, batch: int, compute: Compute) -> None:
    on_gpu = compute.device.type == "cuda"
    averages = found.key_averages()
    kernels = sum(row.count for row in averages if row.device_type == torch.autograd.DeviceType.CUDA)
    calls = sum(row.count for row in averages if row.device_type == torch.autograd.DeviceType.CPU)
    speed = f"{1000 * seconds:.1f} ms a step, {batch / seconds:,.1f} images/s (with the profiler)"
    lines = [f"{compute}, a batch of {batch}: {speed}"]
    lines.append(f"{kernels / STEPS:,.0f} kernels a step" if on_gpu else f"{calls / STEPS:,.0f} calls of operators a step")
    in_parts = hasattr(next(network.parameters()), "to_local")  # on several processes: it cannot be asked here alone
    if isinstance(network, Network) and not in_parts:
        work, peak = 3 * batch * flops(network) / seconds, matrix_peak(compute)
        lines.append(
            f"{work / 1e12:.3g} TFLOP/s in the network's matrix products and convolutions (backward counted as twice forward): "
            f"{work / peak:.0%} of the {peak / 1e12:.3g} TFLOP/s of one large matrix product here, now"
        )
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    text = "\n".join(lines) + "\n\n" + averages.table(sort_by=by, row_limit=25, max_name_column_width=60) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        run.write("profile.json.gz", gzip.compress(trace.read_bytes()))
    say(f"profile of {STEPS} steps: {run.write('profile.txt', text.encode())}")


def flops(network: Network) -> int:
    """Of one question about one picture, forward: a multiplication and an addition are two."""
    device = next(network.parameters()).device
    channels, size = network.channels + network.hint_channels, network.image_size
    cond = torch.zeros(1, dtype=torch.long, device=device) if network.num_classes else None
    if network.text_width:
        cond = torch.ones(1, 1, network.text_width, device=device)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network.forward(torch.zeros(1, channels, size, size, device=device), torch.zeros(1, device=device), cond)
    return int(counted.get_total_flops())


def matrix_peak(compute: Compute) -> float:
    """FLOP/s of a square matrix product in the precision of training: the best of three."""
    size = 8192 if compute.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=compute.device, dtype=compute.autocast)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        total = a @ a
        float(total[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
