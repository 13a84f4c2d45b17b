"""Convolutions of 3 x 3 on a CPU by Winograd's F(4x4, 3x3): faster than torch's (docs/measurements.md), equal to rounding.

The arithmetic is winograd.cpp, in C++ without torch: about a second of work for a compiler, once for a user and a kind of CPU.
It uses torch's own threads. `faster` gives it to the layers of a network that it suits, a rule of their shape alone, so that a
resumed run computes as before; parameters, their names and their layout in memory stay as they are.

Lavin and Gray 2016, "Fast algorithms for convolutional neural networks". Error against float64: about 1e-6 of the norm of the
answer and of gradients, where torch's is 2e-7 to 5e-7.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from diffusion_cli import storage
from diffusion_cli.errors import StorageError
from diffusion_cli.runs import cache_home, say

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx512f", "-mfma")}  # by torch's word for what the CPU can do
TILE, POINTS, PANEL, BLOCK = 4, 36, 32, 64  # as in the source; PANEL: what it asks channels to be multiples of
WORTH = 64 * 64  # channels in times channels out

# -- layers -----------------------------------------------------------------------------------------------------------------


def faster(network: nn.Module) -> None:
    """Gives the network's layers these convolutions where they suit them; one line instead where they cannot be had.

    A network of narrower layers than WORTH, such as that of the bundled digits, gains nothing and is left as it is.
    """
    layers = [module for module in network.modules() if type(module) is nn.Conv2d and suits(module)]
    if not any(layer.in_channels * layer.out_channels >= WORTH for layer in layers):
        return
    try:
        library()
    except Unavailable as error:
        _say_once(f"convolutions: {error}, so torch's are used: slower, and equal to rounding")
        return
    for layer in layers:
        layer.__class__ = WinogradConv2d
    network.register_forward_pre_hook(_channels_last)


_say_once = functools.cache(say)  # of a network, its codec and its guide


def suits(conv: nn.Conv2d) -> bool:
    """Whether the kernel is the one, and the channels fill the source's panels."""
    plain = conv.stride == conv.dilation == (1, 1) and conv.padding in ((1, 1), "same") and conv.padding_mode == "zeros"
    whole = conv.in_channels % PANEL == 0 and conv.out_channels % PANEL == 0
    return plain and whole and conv.groups == 1 and conv.kernel_size == (3, 3) and conv.weight.dtype is torch.float32


class WinogradConv2d(nn.Conv2d):
    """nn.Conv2d, by torch for what is not of its kind: tiny maps, other types, other devices, what is traced or transformed.

    kept: of weights that do not learn meanwhile, these (their storage and version) and what they were transformed to.
    """

    kept: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if not torch.is_grad_enabled():
            return _convolve(x, self.transformed(), self.bias, self.out_channels)
        u = _transformed(self.weight.detach()) if self.weight.requires_grad else self.transformed()
        return _Convolve.apply(x, self.weight, self.bias, u)

    def takes(self, x: Tensor) -> bool:
        """Whether the tiles cover at most twice the picture, and nothing but the numbers is asked for."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            return False
        if any(one.dtype is not torch.float32 or one.device.type != "cpu" for one in (x, self.weight)):
            return False
        H, W = x.shape[2:]
        fits = -(-H // TILE) * -(-W // TILE) * TILE**2 <= 2 * H * W
        watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
        return fits and not watched and not torch.is_autocast_enabled("cpu") and forward_ad.unpack_dual(x).tangent is None

    def transformed(self) -> Tensor:
        weight = self.weight.detach()  # the same storage and version
        if weight.is_inference():  # has no version
            return _transformed(weight)
        if self.kept is None or self.kept[0].data_ptr() != weight.data_ptr() or self.kept[1] != weight._version:
            self.kept = weight, weight._version, _transformed(weight)
        return self.kept[2]


def _channels_last(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The layout in which the layers follow each other without a copy between them."""
    pictures = [isinstance(one, Tensor) and one.dim() == 4 for one in inputs]
    return tuple(one.contiguous(memory_format=torch.channels_last) if is_one else one for one, is_one in zip(inputs, pictures))


class _Convolve(torch.autograd.Function):
    """x [N, C, H, W] channels_last, weight [K, C, 3, 3] and u of it, bias [K] or None -> [N, K, H, W] channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, u, bias, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        dx = _convolve(dy, _transformed(weight, turned=True), None, x.shape[1]) if of_x else None
        dw = _weights_gradient(x, dy) if of_weight else None
        return dx, dw, dy.sum((0, 2, 3)) if of_bias else None, None


# -- calls of the source ----------------------------------------------------------------------------------------------------


def _transformed(weight: Tensor, turned: bool = False) -> Tensor:
    """[K, C, 3, 3] -> what _convolve asks for; turned: for the gradient by x."""
    weight = weight.contiguous()
    K, C = weight.shape[:2]
    u = weight.new_empty(POINTS * C * K)
    library().winograd_weights(_at(weight), K, C, turned, _at(u), torch.get_num_threads())
    return u


def _convolve(x: Tensor, u: Tensor, bias: Tensor | None, K: int) -> Tensor:
    N, C, H, W = x.shape
    y = torch.empty((N, K, H, W), memory_format=torch.channels_last)
    library().winograd_convolve(_at(x), _at(u), _at(bias), _at(y), N, H, W, C, K, torch.get_num_threads())
    return y


def _weights_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """[K, C, 3, 3], summed in parts: work for several threads where the channels alone are none, a matter of shape again."""
    (N, C, H, W), K = x.shape, dy.shape[1]
    blocks, tiles = -(-C // BLOCK) * -(-K // BLOCK), N * -(-H // TILE) * -(-W // TILE)
    parts = max(1, min(32 // blocks, tiles // 128))
    dw = torch.empty((parts, K, C, 3, 3))
    library().winograd_weights_gradient(_at(x), _at(dy), _at(dw), N, H, W, C, K, parts, torch.get_num_threads())
    return dw[0] if parts == 1 else dw.sum(0)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# -- the library ------------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """Why there is no library here."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled source: of the user's cache, or compiled now. Raises Unavailable."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in FLAGS:
        raise Unavailable(f"this CPU has neither {' nor '.join(FLAGS)}")
    key = hashlib.sha256(repr((SOURCE.read_bytes(), FLAGS[capability], torch.__version__)).encode()).hexdigest()[:16]
    path = cache_home() / "winograd" / f"{key}.so"
    try:
        found = ctypes.CDLL(str(path)) if _ours(path) else _compiled(path, FLAGS[capability])
    except OSError as error:  # another machine's, or torch's threads are not of the kind that the compiler counts on
        raise Unavailable(f"{path} cannot be loaded ({error})") from None
    pointer, size, count = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    found.winograd_weights.argtypes = [pointer, size, size, count, pointer, count]
    found.winograd_convolve.argtypes = [pointer] * 4 + [size] * 5 + [count]
    found.winograd_weights_gradient.argtypes = [pointer] * 3 + [size] * 6 + [count]
    for function in (found.winograd_weights, found.winograd_convolve, found.winograd_weights_gradient):
        function.restype = None
    return found


def _ours(path: Path) -> bool:
    """Whether it is there and nobody else wrote it: it is code, and a cache may be shared."""
    try:
        facts = path.stat()
    except OSError:
        return False
    return facts.st_uid == os.getuid() and not facts.st_mode & stat.S_IWOTH


def _compiled(path: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Compiles to the path, for all processes and runs to come; where nothing can be kept there, for this process."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        raise Unavailable("there is no C++ compiler")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made, thing = Path(folder) / "made.o", Path(folder) / "made.so"
        # Not linked with the compiler's OpenMP: torch's is there, and two of them would fight over the cores.
        steps = (["-std=c++17", "-O3", "-fPIC", "-fopenmp", *flags, "-c", str(SOURCE), "-o", str(made)],
                 ["-shared", str(made), "-o", str(thing)])  # fmt: skip
        for words in steps:
            done = subprocess.run([*compiler.split(), *words], capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
                raise Unavailable(f"{compiler} cannot compile them ({lines[0]})")
        found = ctypes.CDLL(str(thing))
        try:
            storage.make_folder(path.parent)
            fresh = path.with_name(f"{path.name}.{Path(folder).name}")  # no other process's
            storage.write(fresh, thing.read_bytes())
            storage.rename(fresh, path)
        except StorageError as error:
            say(f"{error}: the convolutions are compiled anew by each process")
            return found
    say(f"convolutions: Winograd's, compiled in {time.perf_counter() - began:.1f} s and kept: {path}")
    return found
