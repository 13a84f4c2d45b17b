"""Where and in which precision the numbers are computed: the words `device`, `precision`, `compile` and `convolutions`
become facts here."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from diffusion_cli.errors import ConfigError
from diffusion_cli.runs import cache_home
from diffusion_cli.winograd import faster


@dataclass(frozen=True)
class Compute:
    """device; autocast: the type of matrix products, None for plain float32; compile: whether networks are compiled; winograd:
    whether their convolutions are winograd.py's, where these suit them."""

    device: torch.device
    autocast: torch.dtype | None
    compile: bool
    winograd: bool = False

    def precision(self) -> AbstractContextManager[object]:
        """The context in which the network runs."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    @property
    def scales_loss(self) -> bool:
        return self.autocast is torch.float16

    def prepare(self, network: nn.Module) -> None:
        """Makes the network fast in the ways that were chosen; before it is copied, after its weights are what they are."""
        if self.compile:
            network.compile()
        self.convolve(network)

    def convolve(self, module: nn.Module) -> None:
        """The same without compiling, which takes longer than a few calls."""
        if self.winograd:
            faster(module)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        kind = "fp32" if self.autocast is None else str(self.autocast).removeprefix("torch.").replace("bfloat16", "bf16")
        return f"{self.device} ({name}), {kind.replace('float16', 'fp16')}{', compiled' if self.compile else ''}"


_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(
    device: str, precision: str, compile: bool | Literal["auto"], say: Callable[[str], None], convolutions: str = "torch"
) -> Compute:
    """auto: a GPU if there is one, in bf16 and compiled; else the CPU in float32, not compiled, with Winograd's convolutions.
    Raises ConfigError."""
    found = _device(device)
    on_gpu = found.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    if precision == "auto":
        kind = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else None
    else:
        kind = _TYPES[precision]
    if kind is not None and found.type == "cpu" and not (kind is torch.bfloat16 and _cpu_has_bf16()):
        say(f"precision={precision}: this CPU has no such arithmetic and would be several times slower, so fp32 is used")
        kind = None
    compiled = on_gpu if compile == "auto" else compile
    if convolutions == "winograd" and compiled:
        raise ConfigError("convolutions=winograd are not compiled with the network: choose compile=false, or convolutions=auto")
    if compiled:  # torch's own place is /tmp: kept for the next start, of this run or another
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_home() / "compiled"))
    winograd = convolutions != "torch" and found.type == "cpu" and kind is None and not compiled
    if convolutions == "winograd" and not winograd:
        say("convolutions=winograd are for a CPU and fp32, so torch's are used")
    return Compute(found, kind, compiled, winograd)


def _device(word: str) -> torch.device:
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={word} cannot be used ({reason}): choose device=cpu or device=auto") from None
    return torch.device(word)


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # new in torch 2.12 or so
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
