"""DDNM: what the network foresees is moved to the nearest picture that agrees with y (Wang et al. 2023, algorithm 1)

    x0 <- x0 + A^+ (y - A x0)

On a mask and with a sampler's noise that of DDPM this is replacement of the known pixels (Lugmayr et al. 2022, "RePaint",
eq. 8) by the posterior q(x_s | x_t, y). It is not exact: the new parts hear of the known ones through x_t alone, one step
late. Going back in time mends some of it. With noise in y the move stops where x0 is as certain as y, as in DDNM+.
"""

from dataclasses import dataclass

from torch import Tensor

from diffusion_cli.editing.known import Known
from diffusion_cli.editing.method import Binding
from diffusion_cli.samplers import Denoise
from diffusion_cli.schedules import Schedule


@dataclass(frozen=True)
class Projection(Binding):
    """One call of the network where the sampler makes one."""

    def foresee(self, known: Known, ask: Denoise, schedule: Schedule, x: Tensor, t: Tensor, clip: bool) -> Tensor:
        x0 = ask(x, t)
        return known.nearer(schedule, x0.clamp(-1, 1) if clip else x0, t)
