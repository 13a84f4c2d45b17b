"""distributed=fsdp: of weights, gradients, the optimizer's state and the average each of W processes holds a W-th.

    bytes of a process = 20 N / W + those of the blocks that are whole just now        N weights, float32, Adam and an average

A block's weights are gathered when it is asked, forward and backward, and dropped after; its gradients are added up over the
processes, and each keeps its part. Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP"; here torch's
fully_shard. The steps, the figures and the files are those of one process: what is saved and judged is gathered for the first.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusion_cli.collectives import local
from diffusion_cli.distributed import Process
from diffusion_cli.errors import ConfigError
from diffusion_cli.group import Distributed, Loss, Several
from diffusion_cli.objectives import Objective
from diffusion_cli.recomputing import blocks


class FSDP(Distributed):
    """Of all that is trained every process holds a part."""

    def several(self, me: Process) -> Several:
        return Sharded(me, self.patience)


class Sharded(Several):
    """One of several processes, with its part of everything."""

    @property
    def cautious(self) -> bool:  # processes wait for each other in every block, so a step that lacks memory is not done again
        return False

    def share(self, objective: Objective, averages: Sequence[Objective], device: torch.device) -> None:
        """Block by block, so that a device never holds more than its part. ConfigError: a weight that has no parts."""
        self.device = device
        for name, weight in objective.named_parameters():
            if weight.ndim == 0:
                # and EDM2, which has such gains, writes its weights in its forward, where they are gathered for a moment
                raise ConfigError(f"distributed=fsdp: {name} is one number, which has no parts: choose distributed=ddp")
        for module in (objective, *averages):
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)
        average = averages[0]
        hollow = {id(weight): nn.Parameter(weight.to("meta"), requires_grad=False) for weight in average.parameters()}
        self.shell: Objective = copy.deepcopy(average, dict(hollow))  # to be filled
        self.shell._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        mesh = init_device_mesh(device.type, (self.me.world,))
        self.objective = Loss(objective)
        shard(self.objective, objective.network, mesh)
        for average in averages:
            shard(average, average.network, mesh)

    def compile(self, network: nn.Module) -> None:
        for block in blocks(network):
            block.compile()

    def apart(self, last: bool) -> AbstractContextManager[object]:
        cast(FSDPModule, self.objective).set_requires_gradient_sync(last)
        return nullcontext()

    @torch.no_grad()
    def norm(self, tensors: list[Tensor]) -> Tensor:
        return self.total([nn.utils.get_total_norm(local(tensors)).square()])[0].sqrt()

    @torch.no_grad()
    def clip(self, weights: list[nn.Parameter], largest: float) -> Tensor:
        grads = [weight.grad for weight in weights if weight.grad is not None]
        norm = self.norm(grads)
        torch._foreach_mul_(local(grads), torch.clamp(largest / (norm + 1e-6), max=1.0))  # as clip_grad_norm_
        return norm

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._gathered(tensors, torch.device("cpu"))

    @torch.no_grad()
    def _gathered(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """One after the other, and the others keep none."""
        found = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.me.first:
                found[name] = full.to(device)
        return found

    def own(self, tensor: Tensor, like: Tensor | None) -> Tensor:
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor
        part = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return part.clone()  # not a view, which would keep the whole

    @contextmanager
    def judged(self, average: Objective, wanted: bool) -> Iterator[Objective]:
        if not wanted:
            yield average
            return
        tensors = self._gathered(average.state_dict(), self.device)
        if not self.me.first:
            yield average
            return
        empty = dict(self.shell.named_parameters())
        self.shell.load_state_dict(tensors, assign=True)
        del tensors
        yield self.shell
        self.shell.load_state_dict(empty, strict=False, assign=True)


def shard(root: nn.Module, network: nn.Module, mesh: DeviceMesh) -> None:
    """Every block of the network on its own, and then what is left of the root, which is called."""
    # the last block of mmdit hands on the tokens that it was given, and nobody changes them in place
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPJointBlock\)")
    for module in (*blocks(network), root):
        fully_shard(module, mesh=mesh)
        cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)  # not every backend knows a mean
