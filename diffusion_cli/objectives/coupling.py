"""Which noise goes with which picture of a batch: the assignment of least total distance instead of chance.

    pi = argmin over permutations of sum_i |x0_i - noise_pi(i)|^p

p = 2 is optimal transport between the two halves of a batch, by which paths from noise to data cross less and need fewer
steps (Tong et al. 2023, "Improving and generalizing flow-based generative models with minibatch optimal transport", section
3.2; Pooladian et al. 2023); p = 1 is Li et al. 2024, "Immiscible diffusion", algorithm 1. Where the network is told labels,
noise is exchanged among pictures of the same label alone: otherwise it would say something of the label, which no sampler
knows (Cheng and Schwing 2025, "The curse of conditions", section 3). The noises stay what they are, so their
distribution does too; which of them a picture has depends on the rest of its part of the batch, on all processes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion_cli.collectives import gathered


@dataclass(frozen=True)
class Coupling:
    """power: of the distance that is added up."""

    power: Literal[1, 2] = 2

    @torch.no_grad()
    def __call__(self, x0: Tensor, noise: Tensor, label: Tensor | None) -> Tensor:
        """The noise [B, C, H, W] of each picture x0 [B, C, H, W], a permutation of what was drawn. label: [B] or None."""
        all_x0, all_noise = gathered(x0.flatten(1)), gathered(noise.flatten(1))  # [world B, D]
        groups = torch.zeros(len(all_x0)) if label is None else gathered(label).cpu()
        order = torch.arange(len(all_x0))
        for group in groups.unique():
            ids = torch.nonzero(groups == group)[:, 0]
            order[ids] = ids[self.assigned(all_x0[ids.to(x0.device)], all_noise[ids.to(x0.device)])]
        first = dist.get_rank() * len(x0) if len(all_x0) > len(x0) else 0
        return all_noise[order[first : first + len(x0)].to(x0.device)].view_as(noise)

    def assigned(self, x0: Tensor, noise: Tensor) -> Tensor:
        """[n]: which noise goes with which picture; both [n, D]."""
        from scipy.optimize import linear_sum_assignment  # takes half a second to import

        cost = torch.cdist(x0.double(), noise.double()) ** self.power  # [n, n]
        return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
