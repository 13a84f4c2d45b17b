"""scripts/convert_checkpoint.py: converted weights answer as the network of the paper, and no file with code in it is opened.

The references are written from Dhariwal and Nichol 2021 (section 3 and appendix C) and Karras et al. 2022 (appendix F.2), with
the names that the published tensors have; weights are random, away from zero.
"""

import math
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as nnf
from scipy.signal import upfirdn
from test_scripts import load
from tiny import compose
from torch import Tensor, nn

from diffusion_cli import config
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.models import DDPMpp, UNet
from diffusion_cli.predictions import Preconditioned
from diffusion_cli.sampling import sample

pytest.importorskip("diffusers")
convert = load("convert_checkpoint")
WIDTHS, HEAD, CLASSES = (32, 64), 16, 3  # two levels, attention at the second


def waves(time: Tensor, width: int) -> Tensor:
    angles = time[:, None] * 10000 ** (-torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, h, c, N] each -> [B, h * c, N]"""
    weight = torch.softmax(torch.einsum("bhcn,bhcm->bhnm", q, k) / math.sqrt(q.shape[2]), -1)
    return torch.einsum("bhnm,bhcm->bhcn", weight, v).flatten(1, 2)


def resize(x: Tensor, way: str, fir: bool = False) -> Tensor:
    if fir and way:
        return filtered(x, way)
    return {"up": lambda: nnf.interpolate(x, scale_factor=2.0), "down": lambda: nnf.avg_pool2d(x, 2), "": lambda: x}[way]()


def filtered(x: Tensor, way: str, border: int = 1) -> Tensor:
    """By [1, 3, 3, 1]: scipy's upfirdn along rows and along columns. border: zeros around x before a halving."""
    h = x.detach().double().numpy()
    for axis in (2, 3):
        if way == "up":
            h = upfirdn([0.25, 0.75, 0.75, 0.25], h, up=2, axis=axis).take(range(1, 2 * x.shape[axis] + 1), axis)
        else:
            h = np.pad(h, [(border, border) if i == axis else (0, 0) for i in range(4)])
            h = upfirdn([0.125, 0.375, 0.375, 0.125], h, axis=axis).take(range(3, h.shape[axis], 2), axis)
    return torch.from_numpy(h).float()


class GuidedBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, way: str = ""):
        super().__init__()
        self.way = way
        self.in_layers = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * WIDTHS[0], 2 * c_out))
        self.out_layers = nn.Sequential(norm(c_out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](resize(self.in_layers[:2](x), self.way))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(resize(x, self.way)) + h


class GuidedAttention(nn.Module):
    def __init__(self, width: int, order: str):
        super().__init__()
        self.order, self.norm, self.qkv = order, norm(width), nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        rows = self.qkv(self.norm(x).flatten(2))  # [B, 3 C, N]
        if self.order == "hqc":
            q, k, v = rows.unflatten(1, (-1, 3, HEAD)).unbind(2)
        else:
            q, k, v = rows.unflatten(1, (3, -1, HEAD)).unbind(1)
        return x + self.proj_out(attend(q, k, v)).view_as(x)


class Guided(nn.Module):
    """Two residual blocks a level; the answer has the learned variance behind it."""

    def __init__(self, classes: int, order: str = "hqc"):
        super().__init__()
        (a, b), block = WIDTHS, GuidedBlock
        attention = lambda: GuidedAttention(b, order)  # noqa: E731
        self.time_embed = nn.Sequential(nn.Linear(a, 4 * a), nn.SiLU(), nn.Linear(4 * a, 4 * a))
        if classes:
            self.label_emb = nn.Embedding(classes, 4 * a)
        down = [[nn.Conv2d(3, a, 3, padding=1)], [block(a, a)], [block(a, a)], [block(a, a, "down")]]
        down += [[block(a, b), attention()], [block(b, b), attention()]]
        up = [[block(2 * b, b), attention()], [block(2 * b, b), attention()], [block(b + a, b), attention(), block(b, b, "up")]]
        up += [[block(b + a, a)], [block(2 * a, a)], [block(2 * a, a)]]
        self.input_blocks = nn.ModuleList(nn.ModuleList(row) for row in down)
        self.middle_block = nn.ModuleList([block(b, b), attention(), block(b, b)])
        self.output_blocks = nn.ModuleList(nn.ModuleList(row) for row in up)
        self.out = nn.Sequential(norm(a), nn.SiLU(), nn.Conv2d(a, 6, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.time_embed(waves(time, WIDTHS[0]))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        run = lambda row, h: row[0](h) if isinstance(row[0], nn.Conv2d) else [h := part(h, emb) for part in row][-1]  # noqa: E731
        skips = [x]
        for row in self.input_blocks:
            skips.append(run(row, skips[-1]))
        h = run(self.middle_block, skips[-1])
        for row in self.output_blocks:
            h = run(row, torch.cat([h, skips.pop()], 1))
        return self.out(h)


class EDMBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, way: str = "", attention: bool = False):
        super().__init__()
        self.way, self.attention = way, attention
        self.norm0, self.conv0 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine, self.norm1 = nn.Linear(4 * WIDTHS[0], 2 * c_out), norm(c_out)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if way:
            self.conv0.register_buffer("resample_filter", torch.ones(1, 1, 2, 2))
        if attention:
            self.norm2, self.qkv, self.proj = norm(c_out), nn.Conv2d(c_out, 3 * c_out, 1), nn.Conv2d(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(resize(nnf.silu(self.norm0(x)), self.way))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, 1)
        x = self.conv1(nnf.silu(torch.addcmul(shift, self.norm1(h), scale + 1))) + self.skip(resize(x, self.way))
        if self.attention:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, HEAD, 3)).unbind(3)
            x = x + self.proj(attend(q, k, v).view_as(x))
        return x


class EDM(nn.Module):
    """Two blocks a level of 16 and 8 pixels, a linear layer of the one-hot label."""

    def __init__(self, classes: int):
        super().__init__()
        a, b = WIDTHS
        self.map_layer0, self.map_layer1 = nn.Linear(a, 4 * a), nn.Linear(4 * a, 4 * a)
        if classes:
            self.map_label = nn.Linear(classes, 4 * a, bias=False)
        self.enc = nn.ModuleDict({
            "16x16_conv": nn.Conv2d(3, a, 3, padding=1), "16x16_block0": EDMBlock(a, a), "16x16_block1": EDMBlock(a, a),
            "8x8_down": EDMBlock(a, a, "down"), "8x8_block0": EDMBlock(a, b, "", True), "8x8_block1": EDMBlock(b, b, "", True),
        })  # fmt: skip
        self.dec = nn.ModuleDict({
            "8x8_in0": EDMBlock(b, b, "", True), "8x8_in1": EDMBlock(b, b),
            "8x8_block0": EDMBlock(2 * b, b, "", True), "8x8_block1": EDMBlock(2 * b, b, "", True),
            "8x8_block2": EDMBlock(b + a, b, "", True), "16x16_up": EDMBlock(b, b, "up"),
            "16x16_block0": EDMBlock(b + a, a), "16x16_block1": EDMBlock(2 * a, a), "16x16_block2": EDMBlock(2 * a, a),
        })  # fmt: skip
        self.out_norm, self.out_conv = norm(a), nn.Conv2d(a, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.map_layer1(nnf.silu(self.map_layer0(waves(time, WIDTHS[0]))))
        if labels is not None:
            emb = emb + self.map_label(nnf.one_hot(labels, CLASSES).float())
        emb, skips = nnf.silu(emb), [x]
        for name, part in self.enc.items():
            skips.append(part(skips[-1]) if name.endswith("conv") else part(skips[-1], emb))
        h = skips[-1]
        for name, part in self.dec.items():
            h = part(torch.cat([h, skips.pop()], 1) if "block" in name else h, emb)
        return self.out_conv(nnf.silu(self.out_norm(h)))


class DDPMppBlock(nn.Module):
    """EDM's block in its other manner: time is added, sums are divided by sqrt(2), a resized shortcut is projected."""

    def __init__(self, c_in: int, c_out: int, way: str = "", attention: bool = False, fir: bool = False):
        super().__init__()
        self.way, self.attention, self.fir = way, attention, fir
        wide = lambda width: nn.GroupNorm(32, width, eps=1e-6)  # noqa: E731
        self.norm0, self.conv0 = wide(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine, self.norm1 = nn.Linear(4 * WIDTHS[0], c_out), wide(c_out)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or way else nn.Identity()
        if way:
            self.conv0.register_buffer("resample_filter", torch.ones(1, 1, 2 + 2 * fir, 2 + 2 * fir))
            self.skip.register_buffer("resample_filter", torch.ones(1, 1, 2 + 2 * fir, 2 + 2 * fir))
        if attention:
            self.norm2, self.qkv, self.proj = wide(c_out), nn.Conv2d(c_out, 3 * c_out, 1), nn.Conv2d(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(resize(nnf.silu(self.norm0(x)), self.way, self.fir)) + self.affine(emb)[:, :, None, None]
        x = (self.conv1(nnf.silu(self.norm1(h))) + self.skip(resize(x, self.way, self.fir))) / math.sqrt(2)
        if self.attention:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (1, -1, 3)).unbind(3)
            x = (x + self.proj(attend(q, k, v).view_as(x))) / math.sqrt(2)
        return x


class EDMpp(nn.Module):
    """One block a level of 16 and 8 pixels, attention at 8; a linear layer of sqrt(N) times the one-hot label, before both."""

    fir = False

    def __init__(self, classes: int):
        super().__init__()
        (a, b), waves = WIDTHS, WIDTHS[0] * (1 + self.fir)
        block = partial(DDPMppBlock, fir=self.fir)
        self.map_layer0, self.map_layer1 = nn.Linear(waves, 4 * a), nn.Linear(4 * a, 4 * a)
        self.map_augment = nn.Linear(9, waves, bias=False)
        if classes:
            self.map_label = nn.Linear(classes, waves)
        self.enc = nn.ModuleDict({
            "16x16_conv": nn.Conv2d(3, a, 3, padding=1), "16x16_block0": block(a, a),
            "8x8_down": block(a, a, "down"), "8x8_block0": block(a, b, "", True),
        })  # fmt: skip
        self.dec = nn.ModuleDict({
            "8x8_in0": block(b, b, "", True), "8x8_in1": block(b, b), "8x8_block0": block(2 * b, b),
            "8x8_block1": block(b + a, b, "", True), "16x16_up": block(b, b, "up"), "16x16_block0": block(b + a, a),
            "16x16_block1": block(2 * a, a), "16x16_aux_norm": nn.GroupNorm(32, a, eps=1e-6),
            "16x16_aux_conv": nn.Conv2d(a, 3, 3, padding=1),
        })  # fmt: skip

    def waves(self, time: Tensor) -> Tensor:
        half = WIDTHS[0] // 2
        angles = time[:, None] * 10000 ** (-torch.arange(half) / (half - 1))
        return torch.cat([angles.sin(), angles.cos()], 1)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        emb, y = self.waves(time), x
        if labels is not None:
            emb = emb + self.map_label(nnf.one_hot(labels, CLASSES) * math.sqrt(CLASSES))
        emb, skips = nnf.silu(self.map_layer1(nnf.silu(self.map_layer0(emb)))), [x]
        for name, part in self.enc.items():
            if name.endswith("residual"):  # convolved with a border for the filter, which then adds none
                y = skips[-1] = (skips[-1] + filtered(nnf.conv2d(y, part.weight, part.bias, padding=2), "down", 0)) / math.sqrt(
                    2
                )
            else:
                skips.append(part(skips[-1]) if name.endswith("conv") else part(skips[-1], emb))
        h = skips[-1]
        for name, part in self.dec.items():
            if "aux" in name:
                h = nnf.silu(part(h)) if name.endswith("norm") else part(h)
            else:
                h = part(torch.cat([h, skips.pop()], 1) if "block" in name else h, emb)
        return h


class EDMve(EDMpp):
    """The same as NCSN++: filtered, told time by random waves, and reading the picture at 8 pixels again."""

    fir = True

    def __init__(self, classes: int):
        super().__init__(classes)
        self.map_noise = nn.Module()
        self.map_noise.register_buffer("freqs", 16 * torch.randn(WIDTHS[0]))
        parts = list(self.enc.items())
        aux = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        aux.register_buffer("resample_filter", torch.ones(1, 1, 4, 4))
        self.enc = nn.ModuleDict([*parts[:3], ("8x8_aux_residual", aux), *parts[3:]])

    def waves(self, time: Tensor) -> Tensor:
        angles = 2 * math.pi * time[:, None] * self.map_noise.freqs
        return torch.cat([angles.cos(), angles.sin()], 1)


def shaken(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def command(*words: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
        convert.main()


def agrees(folder: Path, network: nn.Module, classes: int, time: Tensor) -> Any:
    denoiser = load_denoiser(find(folder), "ema")
    x, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 2, 1]) if classes else None
    with torch.no_grad():
        theirs, mine = network(x, time, labels), denoiser.network(x, time, labels)
    assert (mine - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max()) and theirs.std() > 0.1
    return denoiser


@pytest.mark.parametrize(("classes", "order"), [(0, "hqc"), (CLASSES, "hqc"), (CLASSES, "qhc")])
def test_guided_diffusion(classes: int, order: str, tmp_path: Path) -> None:
    network = shaken(Guided(classes, order))
    torch.save(network.state_dict(), tmp_path / "it.pt")
    command("guided", tmp_path / "it.pt", tmp_path / "out", "--size", 16, "--head-width", HEAD, "--order", order)
    times = torch.tensor([0.0, 371.0, 999.0])
    denoiser = agrees(tmp_path / "out", network, classes, times)
    assert isinstance(denoiser.network, UNet) and denoiser.network.variance_channels == 3
    assert find(tmp_path / "out").config["config"]["sampler"]["variance"] == "learned"
    other = {"hqc": "qhc", "qhc": "hqc"}[order]
    command("guided", tmp_path / "it.pt", tmp_path / "wrong", "--size", 16, "--head-width", HEAD, "--order", other)
    with pytest.raises(AssertionError):
        agrees(tmp_path / "wrong", network, classes, times)


@pytest.mark.parametrize("classes", [0, CLASSES])
@pytest.mark.parametrize(("kind", "ours"), [(EDM, UNet), (EDMpp, DDPMpp), (EDMve, DDPMpp)])
def test_edm(kind: type, ours: type, classes: int, tmp_path: Path) -> None:
    network = shaken(kind(classes))
    tensors = {f"model.{name}": value.contiguous() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "it.safetensors")
    command("edm", tmp_path / "it.safetensors", tmp_path / "out", "--size", 16, "--head-width", HEAD)
    denoiser = agrees(tmp_path / "out", network, classes, torch.tensor([-1.5, 0.0, 1.0]))
    assert isinstance(denoiser.network, ours) and isinstance(denoiser.prediction, Preconditioned)
    assert denoiser.prediction.sigma_data == 0.5
    words = (f"ckpt={tmp_path / 'out'}", "n=2", "sampler=dpmpp_2m", "sampler.steps=2", f"out={tmp_path / 's'}", "device=cpu")
    sample(config.check_sample(compose(*words, primary="sample")))


class Code:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_ddpmpp_and_ncsnpp_are_as_large_as_their_papers_say() -> None:
    """Karras et al. 2022, table 7: 56 million weights of either for CIFAR-10, 62 million of DDPM++ for FFHQ and AFHQ. Song et
    al. 2021, appendix H, doubled the depth for their best figure of NCSN++ on CIFAR-10: 108 million, as its users count."""
    more: dict[str, Any] = {"resample": "fir", "embedding": "fourier", "encoder": "residual"}
    with torch.device("meta"):
        networks = [DDPMpp(3, 32, 0), DDPMpp(3, 64, 0, multipliers=(1, 2, 2, 2), attention_levels=(2,))]
        networks += [DDPMpp(3, 32, 0, **more), DDPMpp(3, 32, 0, multipliers=(1, 2, 2, 2), blocks=8, **more)]
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert [round(size / 1e6) for size in sizes] == [56, 62, 56, 108]
    wider_waves, rereads = 128 * 512, 3 * 9 * 256 + 256 + 256 * 9 * 256 + 256
    assert sizes[2] - sizes[0] == wider_waves + rereads


def test_what_has_no_counterpart_or_has_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Guided(0).state_dict()

    def refused(name: str, value: Any, said: str, kind: str = "guided", width: int = HEAD) -> None:
        if isinstance(value, bytes):
            Path(name).write_bytes(value)
        else:
            torch.save(value, name)
        with pytest.raises(SystemExit, match=said):
            command(kind, name, "out", "--size", 16, "--head-width", width)
        assert not Path("out").exists() and not Path("executed").exists()

    refused("it.pkl", pickle.dumps({"ema": Code()}), "a .pkl has code in it, and is not opened", "edm")
    refused("it.pt", {**weights, "more": Code()}, "cannot be opened without running code")
    refused("it.pt", {"model": weights}, "more than tensors by name")
    refused("it.pt", weights, "names are not those of a network of EDM", "edm")
    refused("it.pt", {**EDMpp(0).state_dict(), "map_other.freqs": torch.zeros(1)}, "map_other.freqs has no place", "edm")
    refused("it.pt", {n: v for n, v in weights.items() if not n.startswith("output_blocks.2.2")}, "joined by convolutions")
    refused("it.pt", {**weights, "input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "input has 6 channels")
    refused("it.pt", {**weights, "time_embed.0.weight": torch.zeros(128, 64)}, "told in 64 waves")
    refused("it.pt", {**weights, "input_blocks.9.0.op.weight": torch.zeros(1)}, "has no place in this network")
    refused("it.pt", weights, "another --head-width", width=48)
    refused("it.pt", b"not a file of torch", "cannot be opened without running code")
