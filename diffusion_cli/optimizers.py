"""Optimizers as recipes: the rule that updates the weights, and the learning rate as a pure function of the step.

Nothing of the rate is saved: a resumed run computes it again from the step.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_cli.errors import ConfigError
from diffusion_cli.pace import Pace
from diffusion_cli.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Rate

ONE = Pace(1)  # picture in each step


class Decay(ABC):
    """How the learning rate falls over a run."""

    @abstractmethod
    def factor(self, step: int, total: int, pace: Pace = ONE) -> float:
        """Factor on the rate at step 0, 1 ... of `total`, each of as many pictures as pace says."""


@dataclass(frozen=True)
class Constant(Decay):
    def factor(self, step: int, total: int, pace: Pace = ONE) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Decay):
    def factor(self, step: int, total: int, pace: Pace = ONE) -> float:
        return max(0.0, 1 - step / total)


@dataclass(frozen=True)
class Cosine(Decay):
    """Half a cosine (Loshchilov and Hutter 2017)."""

    def factor(self, step: int, total: int, pace: Pace = ONE) -> float:
        return (1 + math.cos(math.pi * min(1.0, step / total))) / 2


@dataclass(frozen=True)
class Late(Decay):
    """Constant, then linear to 0 over the last `share` of the run."""

    share: Fraction = 0.3

    def factor(self, step: int, total: int, pace: Pace = ONE) -> float:
        return min(1.0, max(0.0, 1 - step / total) / self.share) if self.share else 1.0


@dataclass(frozen=True)
class Steps(Decay):
    """Times `by` after every `every` steps, but the rate never falls below floor (as a share of the first rate)."""

    every: PositiveInt = 5000
    by: Fraction = 0.9
    floor: Fraction = 0.0

    def factor(self, step: int, total: int, pace: Pace = ONE) -> float:
        return max(self.floor, self.by ** (step // self.every))


@dataclass(frozen=True)
class InverseSqrt(Decay):
    """1 / sqrt(n / images) after n pictures, and 1 before `images` of them (Karras et al. 2024, EDM2, configuration E)."""

    images: PositiveInt = 70_000_000

    def factor(self, step: int, total: int, pace: Pace = ONE) -> float:
        return 1 / math.sqrt(max(pace.seen(step) / self.images, 1.0))


class Optimizer(ABC):
    """A recipe: makes a torch optimizer and says the rate at each step."""

    clip: float | None

    @abstractmethod
    def make(self, module: nn.Module) -> torch.optim.Optimizer:
        """For all parameters of the module that need a gradient; its `state` is by parameter."""

    @abstractmethod
    def rate(self, step: int, total: int, pace: Pace = ONE) -> float:
        """The learning rate of step 0, 1 ... of `total`, each of as many pictures as pace says."""


def state_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """What it remembers of each weight, by NAME/WHAT."""
    state = {name: optimizer.state.get(weight, {}) for name, weight in module.named_parameters()}
    return {f"{name}/{key}": value for name, found in state.items() for key, value in found.items()}


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Kingma and Ba 2015; Loshchilov and Hutter 2019); with weight_decay 0, Adam.

    warmup: steps of a linear rise from 0; warmup_images: the same in pictures, and the later of the two counts; clip: largest
    norm of the gradient, None for no limit.
    """

    lr: PositiveFloat
    betas: tuple[Rate, Rate]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup: NonNegativeInt
    clip: PositiveFloat | None
    decay: Decay
    warmup_images: NonNegativeInt = 0

    def make(self, module: nn.Module) -> torch.optim.Optimizer:
        return self._adamw([p for p in module.parameters() if p.requires_grad])

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )

    def rate(self, step: int, total: int, pace: Pace = ONE) -> float:
        rise = min((step + 1) / max(self.warmup, 1), pace.seen(step + 1) / max(self.warmup_images, 1), 1.0)
        return self.lr * rise * self.decay.factor(step, total, pace)


_ENDS = ("conv_in", "conv_out", "patches_in", "patches_out")  # the first and last layers of this program's networks


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Matrices move by a matrix whose singular values are all about 1 (Jordan et al. 2024, "Muon"); the rest by AdamW.

        B <- momentum B + (1 - momentum) G      N = momentum B + (1 - momentum) G = U S V^T
        W <- (1 - lr weight_decay) W - 0.2 lr sqrt(max(rows, columns)) U V^T, by five steps of Newton-Schulz

    The factor gives O the root mean square of AdamW's updates, so that both go by one rate (Liu et al. 2025, "Muon is scalable
    for LLM training", eq. 4). A kernel [c_out, c_in, k, k] is the matrix [c_out, c_in k k]. Matrices are the weights of linear
    and convolutional layers; vectors, tables of embeddings and the layers named `apart`, the first and last, are AdamW's.
    """

    momentum: Rate
    apart: tuple[str, ...]

    def make(self, module: nn.Module) -> torch.optim.Optimizer:
        last = lambda name: name.rpartition(".")[2]  # noqa: E731
        layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
        if strange := set(self.apart) - set(_ENDS) - set(map(last, layers)):
            raise ConfigError(f"optimizer.apart names {', '.join(sorted(strange))}, and no layer is called so")
        found = [layer.weight for name, layer in layers.items() if last(name) not in self.apart and layer.weight.requires_grad]
        matrices = [weight for weight in found if min(weight.flatten(1).shape) > 1]
        if not matrices:
            raise ConfigError(
                "optimizer=muon finds no matrix to move: choose optimizer=adamw, or fewer names for optimizer.apart"
            )
        taken = set(map(id, matrices))
        return _MuonAndAdamW(self, matrices, [p for p in module.parameters() if p.requires_grad and id(p) not in taken])


class _MuonAndAdamW(torch.optim.Optimizer):
    """Both as one: a group, a rate and a state by parameter for each."""

    def __init__(self, recipe: Muon, matrices: list[nn.Parameter], rest: list[nn.Parameter]):
        super().__init__([{"params": group} for group in (matrices, rest) if group], {"lr": recipe.lr})
        self.recipe = recipe
        self.shaped: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)  # one question for all matrices of a shape
        for p in matrices:
            self.shaped[p.flatten(1).shape].append(p)
        self.adamw = recipe._adamw(rest) if rest else None
        if self.adamw is not None:
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        lr = self.param_groups[0]["lr"]
        for shape, matrices in self.shaped.items():
            moving = [p for p in matrices if p.grad is not None]
            if moving:
                N = torch.stack([self._mean(p).view(shape) for p in moving])  # [n, rows, columns]
                torch._foreach_mul_(moving, 1 - lr * self.recipe.weight_decay)
                O = orthogonal(N).to(N).mul_(-0.2 * lr * math.sqrt(max(shape)))
                torch._foreach_add_(moving, [one.view_as(p) for one, p in zip(O, moving, strict=True)])
        if self.adamw is not None:
            self.adamw.param_groups[0]["lr"] = self.param_groups[-1]["lr"]
            self.adamw.step(closure)

    def _mean(self, p: nn.Parameter) -> Tensor:
        """N of the class above."""
        assert p.grad is not None
        G, state, momentum = p.grad.flatten(1), self.state[p], self.recipe.momentum
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(G)
        return G.lerp(state["momentum_buffer"].lerp_(G, 1 - momentum), momentum)


def orthogonal(N: Tensor) -> Tensor:
    """[n, rows, columns] to nearly U V^T of each N = U S V^T, with singular values from 0.65 to 1.2, by five steps of

        X <- a X + (b X X^T + c (X X^T)^2) X        from N / |N|

    In bf16 on a GPU, as published; in float32 on a CPU, most of which multiply in bf16 ten to thirty times as slowly.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024: the steepest at 0 among quintics that stay near 1
    X = N.to(torch.bfloat16 if N.device.type == "cuda" else torch.float32)
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X
