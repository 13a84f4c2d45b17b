"""Winograd's convolutions give what torch's give, to rounding; the same bits whatever the threads, the batch and the layout."""

import copy
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from tiny import hashes, stopped, train
from torch import Tensor, nn

from diffusion_cli import ema, winograd
from diffusion_cli.devices import choose
from diffusion_cli.errors import ConfigError
from diffusion_cli.models import UNet
from diffusion_cli.winograd import WinogradConv2d, faster

NET = ("model.width=32", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.groups=8")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library, compiled once for these tests into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        winograd.library.cache_clear()
        try:
            winograd.library()
        except winograd.Unavailable as error:
            pytest.skip(f"{error}")
        yield Path(os.environ["XDG_CACHE_HOME"]) / "diffusion-cli" / "winograd"
    winograd.library.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def layer(C: int, K: int, bias: bool = True) -> WinogradConv2d:
    conv = nn.Conv2d(C, K, 3, padding=1, bias=bias)
    conv.__class__ = WinogradConv2d
    return conv


def outcome(conv: nn.Conv2d, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The answer, and the gradients of sum(y dy)."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    conv.zero_grad()
    y = conv(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, **{f"d{name}": p.grad for name, p in conv.named_parameters()}}
    return {name: value.clone() for name, value in found.items() if value is not None}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


# -- the arithmetic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize(
    "shape",
    [(2, 32, 32, 8, 8), (1, 64, 32, 10, 14), (5, 32, 96, 4, 4), (3, 160, 64, 7, 9), (1, 32, 64, 33, 5), (2, 256, 128, 16, 16)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_equals_torch_to_rounding(shape: tuple[int, ...], bias: bool, last: bool) -> None:
    """Answer and gradients against float64: below 1e-5 of their norm, and within 8 times torch's own error."""
    N, C, K, H, W = shape
    ours, layout = layer(C, K, bias), torch.channels_last if last else torch.contiguous_format
    theirs = nn.Conv2d(C, K, 3, padding=1, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, dy = torch.randn(N, C, H, W).to(memory_format=layout), torch.randn(N, K, H, W).to(memory_format=layout)
    assert ours.takes(x)
    found, usual = outcome(ours, x, dy), outcome(theirs, x, dy)
    exact = outcome(copy.deepcopy(theirs).double(), x.double(), dy.double())
    assert found.keys() == exact.keys() and len(found) == 3 + bias
    for name, value in exact.items():
        assert error(found[name], value) < max(4e-6, 8 * error(usual[name], value)) and error(found[name], value) < 1e-5, name


def test_each_number_is_one_sum_in_one_order() -> None:
    """So neither threads, nor the batch, nor the layout changes a bit; and a second time gives the same."""
    ours, x, dy = layer(64, 32), torch.randn(6, 64, 12, 20), torch.randn(6, 32, 12, 20)
    once = outcome(ours, x, dy)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            again = outcome(ours, x.to(memory_format=torch.channels_last), dy)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(once[name], again[name]) for name in ("y", "dx", "dweight"))
    part = outcome(ours, x[2:4], dy[2:4])
    assert torch.equal(once["y"][2:4], part["y"]) and torch.equal(once["dx"][2:4], part["dx"])
    assert not torch.equal(once["y"], nnf.conv2d(x, ours.weight, ours.bias, padding=1)), "torch computed it"


def test_many_tiles_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = (torch.randn(4, 32, 64, 64).contiguous(memory_format=torch.channels_last) for _ in range(2))
    parts: list[tuple[int, ...]] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape: parts.append(shape) or empty(shape))
    dw = winograd._weights_gradient(x, dy)
    assert parts == [(8, 32, 32, 3, 3)]
    exact = nnf.conv2d(x.double().transpose(0, 1), dy.double().transpose(0, 1), padding=1).transpose(0, 1)
    assert error(dw, exact) < 4e-6


def test_of_a_whole_network() -> None:
    """A U-Net with attention, its answer and all gradients: within 1e-5 of float64's, and of layers that are ours."""
    plain = UNet(3, 16, 4, width=32, multipliers=(1, 2), blocks=1, groups=8, dropout=0.0)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.02 * torch.randn_like(p))  # where all begins at zero, nothing would be compared
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    exact.time_embedding.linear1.register_forward_pre_hook(lambda _, inputs: inputs[0].double())  # its waves are float32
    faster(ours)
    assert sum(isinstance(module, WinogradConv2d) for module in ours.modules()) > 10
    x, time, labels = torch.randn(3, 3, 16, 16), torch.tensor([1.0, 300.0, 900.0]), torch.tensor([0, 3, 4])
    answers = []
    for network, kind in ((ours, torch.float32), (plain, torch.float32), (exact, torch.float64)):
        y = network(x.to(kind), time.to(kind), labels)
        (y * torch.arange(y.numel()).reshape(y.shape).to(kind).cos()).sum().backward()
        answers.append(torch.cat([y.detach().flatten(), *(p.grad.flatten() for p in network.parameters())]))
    found, usual, true = answers
    assert error(found, true) < 1e-5 and error(usual, true) < 1e-5
    assert not torch.equal(found, usual)


# -- what else a layer does -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_kept_weights_follow_the_weights() -> None:
    ours, x = layer(32, 32), torch.randn(2, 32, 8, 8)

    def right() -> bool:
        return error(ours(x), nnf.conv2d(x, ours.weight, ours.bias, padding=1).double()) < 1e-5

    assert right() and ours.kept is not None
    before = ours.kept[2]
    assert right() and ours.kept[2] is before, "transformed again for nothing"
    other = layer(32, 32)
    ema.update(ours, other, 0.5)
    assert right() and ours.kept[2] is not before
    ours.load_state_dict(other.state_dict())
    assert right()
    ours.weight.data = torch.randn(32, 32, 3, 3)
    assert right()
    with torch.inference_mode():
        ours.weight.mul_(2.0)
        assert right()
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    twin = copy.deepcopy(ours)
    twin.weight.mul_(3.0)
    assert right() and not torch.equal(twin(x), ours(x))


def test_the_module_tree_stays_as_it_is() -> None:
    plain = UNet(3, 16, 0, width=32, multipliers=(1, 2), blocks=1, groups=8)
    ours = copy.deepcopy(plain)
    faster(ours)
    before, after = plain.state_dict(), ours.state_dict()
    assert list(before) == list(after) and [name for name, _ in plain.named_modules()] == [n for n, _ in ours.named_modules()]
    assert all(torch.equal(before[k], after[k]) and before[k].stride() == after[k].stride() for k in before)
    back = UNet(3, 16, 0, width=32, multipliers=(1, 2), blocks=1, groups=8)
    back.load_state_dict(after)


def test_what_is_not_of_its_kind_is_left_to_torch() -> None:
    others = [
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1), nn.Conv2d(3, 2048, 3, padding=1),
        nn.Conv2d(64, 80, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"), nn.Conv2d(64, 64, 3, padding=1).double(),
        UNet(1, 8, 10, width=16, multipliers=(1, 2), blocks=1, attention_levels=(), groups=8),
    ]  # fmt: skip
    for conv in others:
        faster(conv)
        assert not any(isinstance(module, WinogradConv2d) for module in conv.modules()) and not conv._forward_pre_hooks
    assert winograd.suits(nn.Conv2d(32, 32, 3, padding="same"))
    ours, x = layer(32, 32), torch.randn(2, 32, 8, 8)
    assert ours.takes(x)
    for tiny in (torch.randn(2, 32, 2, 2), torch.randn(2, 32, 5, 5), torch.randn(32, 8, 8)):
        assert not ours.takes(tiny)
        y = ours(tiny)
        assert torch.allclose(y, nnf.conv2d(tiny, ours.weight, ours.bias, padding=1), atol=1e-6)
        assert type(y.grad_fn) is not type(ours(x).grad_fn)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="expected input"):
        ours(torch.randn(2, 64, 8, 8))
    with pytest.raises(RuntimeError, match="type"):
        copy.deepcopy(ours).double()(x)


def test_derivatives_that_it_has_not() -> None:
    """Forward ones are torch's; a second one is refused instead of being wrong."""
    ours, x, v = layer(32, 32), torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8)
    _, along = torch.func.jvp(ours, (x,), (v,))
    along = along.detach()
    assert error(along, nnf.conv2d(v.double(), ours.weight.double(), padding=1)) < 1e-5
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = ours(torch.autograd.forward_ad.make_dual(x, v))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, along, atol=1e-5)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_frozen_weights_pass_gradients_on() -> None:
    """What guidance by a classifier and edits ask for: the gradient by x alone; and of biases alone."""
    ours, x = layer(32, 64).requires_grad_(False), torch.randn(2, 32, 8, 8, requires_grad=True)
    ours(x).sum().backward()
    assert ours.kept is not None and ours.weight.grad is None
    by_x = x.grad.clone()
    ours.bias.requires_grad_()
    ours(x.detach()).sum().backward()
    assert torch.equal(ours.bias.grad, torch.full((64,), 128.0))
    x.grad = None
    nnf.conv2d(x, ours.weight, ours.bias, padding=1).sum().backward()
    assert error(by_x, x.grad.double()) < 1e-5


# -- a word of the config ---------------------------------------------------------------------------------------------------


def test_the_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(precision: str, compile: bool | str, word: str) -> bool:
        return choose("cpu", precision, compile, print, word).winograd  # type: ignore[arg-type]

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert chosen("auto", "auto", "auto") and chosen("fp32", False, "winograd")
    assert not chosen("fp32", False, "torch") and not chosen("fp32", True, "auto")
    with pytest.raises(ConfigError, match=r"convolutions=winograd .* compile=false"):
        chosen("fp32", True, "winograd")
    monkeypatch.setattr("diffusion_cli.devices._cpu_has_bf16", lambda: True)
    assert not chosen("bf16", False, "auto") and not capsys.readouterr().out
    assert not chosen("bf16", False, "winograd") and "torch's are used" in capsys.readouterr().out


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, compiled: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """To the bit; torch's convolutions give another run, which differs by rounding, and may take over at any step."""
    words = (*NET, "trainer.steps=4", "trainer.save_every=0", "model.dropout=0.1", "sampler.steps=1")
    whole = train(tmp_path, *words, name="whole")
    stopped(tmp_path, 2, *words)
    assert hashes(train(tmp_path, *words)) == hashes(whole)
    by_torch = train(tmp_path, *words, "convolutions=torch", name="torch")
    assert hashes(by_torch) != hashes(whole)
    assert len(list(compiled.iterdir())) == 1


def test_a_resume_without_a_compiler_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (*NET, "trainer.steps=2", "trainer.save_every=0", "sampler.steps=1")
    stopped(tmp_path, 1, *words)
    lacking(monkeypatch, tmp_path)
    train(tmp_path, *words)
    assert "no C++ compiler, so torch's are used: slower, and equal to rounding" in capfd.readouterr().out


# -- the library ------------------------------------------------------------------------------------------------------------


def lacking(monkeypatch: pytest.MonkeyPatch, folder: Path, compiler: str | None = None) -> None:
    """A machine where nothing is compiled yet, with that compiler."""
    winograd.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(winograd.shutil, "which", lambda name: None)
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", compiler)


@pytest.fixture(autouse=True)
def back(compiled: Path) -> Iterator[None]:
    yield
    winograd.library.cache_clear()
    winograd._say_once.cache_clear()


@pytest.mark.parametrize(
    "compiler, says", [(None, "there is no C++ compiler"), ("false", "false cannot compile them (exit status 1)")]
)
def test_one_line_where_it_cannot_be_had(
    compiler: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lacking(monkeypatch, tmp_path, compiler)
    network = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1))
    faster(network)
    assert [type(module) for module in network] == [nn.Conv2d] * 2 and not network._forward_pre_hooks
    (line,) = capfd.readouterr().out.splitlines()
    assert says in line and "torch's are used" in line
    faster(network)
    faster(nn.Conv2d(3, 8, 3, padding=1))
    assert not capfd.readouterr().out, "said once, and nothing is lacking for a network that could not use it"


def test_another_processor(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    winograd.library.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    faster(nn.Conv2d(64, 64, 3, padding=1))
    assert "this CPU has neither AVX2 nor AVX512, so torch's are used" in capfd.readouterr().out


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, compiled: Path) -> None:
    (there,) = compiled.iterdir()
    lacking(monkeypatch, tmp_path)
    place = tmp_path / "cache" / "diffusion-cli" / "winograd" / there.name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"no library")
    faster(nn.Conv2d(64, 64, 3, padding=1))
    assert f"{place} cannot be loaded" in capfd.readouterr().out


def test_what_somebody_else_wrote_is_not_run(monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:
    (there,) = compiled.iterdir()
    assert winograd._ours(there) and not winograd._ours(there.with_name("missing"))
    monkeypatch.setattr(winograd.os, "getuid", lambda: there.stat().st_uid + 1)
    assert not winograd._ours(there)
    monkeypatch.undo()
    there.chmod(0o666)
    assert not winograd._ours(there)
    there.chmod(0o644)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    winograd.library.cache_clear()
    assert error(layer(32, 32)(torch.zeros(1, 32, 8, 8)), torch.ones(1).double()) > 0
    assert "compiled anew by each process" in capfd.readouterr().out


def test_two_that_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:
    """Both have it, one file stays, and who comes later needs no compiler."""
    (there,) = compiled.iterdir()
    flags = winograd.FLAGS[torch.backends.cpu.get_cpu_capability()]
    path = tmp_path / "cache" / "diffusion-cli" / "winograd" / there.name
    with ThreadPoolExecutor() as pool:
        for found in pool.map(lambda _: winograd._compiled(path, flags), range(2)):
            assert found.winograd_convolve
    assert list(path.parent.iterdir()) == [path]
    lacking(monkeypatch, tmp_path)
    winograd.library()
