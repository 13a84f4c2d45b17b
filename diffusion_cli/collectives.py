"""What one process has of a batch, and all of them together have."""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def gathered(rows: Tensor) -> Tensor:
    """[B, ...] of every process of a training run -> [world B, ...], in the order of ranks and so of slots; alone the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
