"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): x0 is extrapolated in log(alpha / sigma) before the move."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """Order 2, deterministic, one call of the network a step; the first and the last step are of order 1."""

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        lambdas = schedule.log_snr(times) / 2  # [steps + 1]: -inf at alpha = 0, +inf at t = 0
        before = None
        for i, (t, s) in enumerate(pairwise(times)):
            x0 = ask(x, t)
            yield State(i, t, x, x0)
            D = x0
            if before is not None and s > 0:
                share = (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1]) / 2  # 1 / (2 r); 0 after alpha = 0
                D = x0 + over_pictures(share, x) * (x0 - before)
            x, before = schedule.transfer(x, D, t, s), x0
        yield State(len(times) - 1, times[-1], x, x)
