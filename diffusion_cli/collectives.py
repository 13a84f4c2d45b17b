"""What one process has of a batch, and all of them together have."""

from collections.abc import Iterable

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


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each lies on this process: of a tensor that several hold parts of, its own part."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
