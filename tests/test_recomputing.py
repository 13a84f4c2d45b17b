"""recompute=true keeps less and changes nothing; profile=true says where the time goes."""

import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from test_models import OPTIONS, READERS, make
from tiny import hashes, train
from torch import nn

from diffusion_cli.devices import Compute
from diffusion_cli.errors import ConfigError
from diffusion_cli.profiling import flops, matrix_peak
from diffusion_cli.recomputing import recompute


def bytes_kept(network: nn.Module, *asked: torch.Tensor | None) -> tuple[int, list[torch.Tensor]]:
    """What forward saves for backward, and the gradients."""
    kept, weights = 0, {parameter.data_ptr() for parameter in network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in weights else tensor.numel() * tensor.element_size()
        return tensor

    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.manual_seed(1)  # of dropout
        loss = network(*asked).square().sum()
    loss.backward()
    return kept, [torch.zeros(()) if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in (*READERS, "unet_basic")])
def test_recomputing_keeps_less_and_gives_the_same_gradients_to_the_bit(option: str) -> None:
    network = make(option, 1, 8 if option != "unet2d" else 16, 3)
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # what begins at zero gives no gradient
    asked = (torch.randn(4, 1, network.image_size, network.image_size), torch.rand(4), torch.tensor([0, 1, 2, 3]))
    kept, grads = bytes_kept(network, *asked)
    names = list(network.state_dict())
    recompute(network)
    less, again = bytes_kept(network, *asked)
    assert list(network.state_dict()) == names
    rounded = option.startswith("edm2")  # it normalises its weights in each forward, and so once more
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) if rounded else torch.equal(a, b) for a, b in zip(grads, again))
    assert less < 0.6 * kept
    copied = copy.deepcopy(network).eval()
    with torch.no_grad():
        assert torch.equal(copied(*asked), network.eval()(*asked))


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="recompute=true: UNetBasic has no blocks"):  # a convolution keeps its input alone
        recompute(make("unet_basic", 1, 8))


def test_a_run_learns_the_same_and_its_profile_is_written(tmp_path: Path) -> None:
    more = ("trainer.steps=11", "model.dropout=0.2", "trainer.save_every=0")
    plain, other = train(tmp_path, *more, name="plain"), train(tmp_path, *more, "recompute=true", "profile=true", name="other")
    assert hashes(plain) == hashes(other)
    text = (other / "profile.txt").read_text()
    assert "images/s" in text and "TFLOP/s" in text and "aten::convolution_backward" in text
    trace = json.loads(gzip.decompress((other / "profile.json.gz").read_bytes()))
    assert len({event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")}) == 5


def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "profile=true")
    assert "no profile: it is made of steps 6 to 10" in capsys.readouterr().out and not (run / "profile.txt").exists()


def test_flops_are_counted() -> None:
    basic = make("unet_basic", 1, 28)
    convolutions = [part for part in basic.modules() if isinstance(part, nn.Conv2d)]
    full = 2 * 28 * 28 * sum(part.weight.numel() for part in convolutions if part in (convolutions[0], convolutions[-1]))
    assert full < flops(basic) < 2 * 28 * 28 * sum(part.weight.numel() for part in convolutions)
    assert matrix_peak(Compute(torch.device("cpu"), None, False)) > 1e8
