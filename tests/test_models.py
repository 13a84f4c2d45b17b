"""Every configs/model/*.yaml is built and asked for the promises of the contract; a new option is picked up by itself.

Then the numbers that papers and tutorials state, and agreement with diffusers' UNet2DModel weight by weight.
"""

import inspect
import re
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from often import some
from omegaconf import OmegaConf
from torch import nn

from diffusion_cli import config, models, signatures
from diffusion_cli.models.diffusers_names import renamed
from diffusion_cli.models.dit import positions
from diffusion_cli.models.network import Network
from diffusion_cli.models.time_embedding import sinusoids
from diffusion_cli.vision import mend_torchvision

CONFIGS = Path(__file__).parents[1] / "configs"
OTHERS = {  # tests/test_classifying.py, test_autoencoding.py, test_contrasting.py, test_export_texts.py
    "classifier": models.Classifier,
    "autoencoder_kl": models.Autoencoder,
    "autoencoder_vq": models.Autoencoder,
    "clip": models.Clip,
    "unet2d_condition": models.UNet2DCondition,
}
OPTIONS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml") if path.stem not in OTHERS)
PICTURES = {"mnist": (1, 28), "cifar10": (3, 32), "digits": (1, 8)}
TIMELESS = {"unet_basic"}  # networks that are not told the time
READERS = ("unet_text", "mmdit")  # made for texts: they are told tokens where the others are told labels
SMALLER = {  # of some the whole is counted alone: here, and in tests/test_convert.py
    "ddpmpp": {"width": 32, "groups": 8, "blocks": 2},
    "ncsnpp": {"width": 32, "groups": 8, "blocks": 2},
    "adm": {"width": 32, "groups": 8, "blocks": 1, "head_width": 16},
    "edm2": {"width": 32, "blocks": 1, "head_width": 16},
    "uvit": {"width": 32, "depth": 5, "heads": 2},
    "transformer": {"width": 32, "depth": 2, "heads": 2},
}
FACTS = list(config.FACTS[:-1])  # said by the program; the last, a vocabulary, is CLIP's
NULL = 5  # the classes of the conditional networks here, and so the index of the null label

every_option = pytest.mark.parametrize("option", OPTIONS)


@lru_cache
def node(option: str) -> dict:
    """The option's YAML, with what it inherits, as a plain dict."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose(overrides=[f"+model={option}"]).model)


def make(option: str, channels: int, size: int, classes: int = 0, **changes) -> Network:
    keys = {**node(option), **SMALLER.get(option, {}), **({"text_width": 6} if option in READERS else {}), **changes}
    torch.manual_seed(0)
    return getattr(models, keys.pop("_target_").rpartition(".")[2])(channels, size, classes, **keys)


def test_every_option_is_a_network_or_something_else_that_is_known() -> None:
    for option in [*OPTIONS, *OTHERS]:
        base = OTHERS.get(option, Network)
        assert issubclass(getattr(models, node(option)["_target_"].rpartition(".")[2]), base), option


def stir(network: nn.Module, seed: int = 1) -> nn.Module:
    """Away from the zeros of a fresh network, which hide what lies behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


def batch(channels: int, size: int, count: int = 2, seed: int = 2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, 1000 * torch.rand(count, generator=generator)


def told(network: Network, *labels: int) -> torch.Tensor | None:
    """The labels [B], or for a reader a text [B, 4, D] for each of them, some with padding; None: without either."""
    if network.text_width:
        words = torch.randn(NULL + 1, 4, network.text_width, generator=torch.Generator().manual_seed(4))
        words[::3, 2:], words[::2, 0] = 0, 0
        return words[list(labels)]
    return torch.tensor(labels) if network.num_classes else None


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@lru_cache
def narrowing(option: str) -> dict:
    """What makes a large option quick: its width changes no line of code."""
    with torch.device("meta"):
        return {"width": 32} if parameters(make(option, 3, 32)) > 10e6 else {}


def small(option: str, classes: int = 0, channels: int = 1, **facts: int) -> Network:
    """The option at the smallest of the sizes that it takes, narrow, stirred and in evaluation mode."""
    try:
        return stir(make(option, channels, 8, classes, **facts, **narrowing(option))).eval()
    except ValueError:
        return stir(make(option, channels, 28, classes, **facts, **narrowing(option))).eval()


# --- every option -----------------------------------------------------------------------------------------------------


@every_option
def test_yaml_states_every_key_and_says_what_it_is(option):
    text = (CONFIGS / "model" / f"{option}.yaml").read_text()
    first = text.splitlines()[0]
    assert first.startswith("# ") and len(first) < 90
    keys = node(option)
    network = getattr(models, keys["_target_"].removeprefix("diffusion_cli.models."))
    parameters = list(inspect.signature(network).parameters.values())
    facts = [p.name for p in parameters if p.name in FACTS]
    assert set(FACTS[:4]) <= set(facts) and facts == [name for name in FACTS if name in facts]
    assert facts == [p.name for p in parameters[: len(facts)]]
    assert set(keys) - {"_target_"} == {p.name for p in parameters[len(facts) :]}
    assert issubclass(network, Network)


@every_option
def test_the_signature_is_a_schema_that_is_read_without_torch(option):
    def faults(keys: dict) -> list[str]:
        return signatures.check(keys, "diffusion_cli.models.Network", "model", given=FACTS)

    keys = node(option)
    assert faults(keys) == []
    for key in set(keys) - {"_target_"}:
        assert faults({**keys, key: "nonsense"}), f"{key} takes anything: its annotation cannot be read"


@every_option
@pytest.mark.parametrize(
    ("pictures", "classes"), some(list(product(PICTURES, [0, NULL])), [("mnist", 0), ("cifar10", NULL), ("digits", NULL)])
)
def test_forward_and_backward_reach_everything(option, pictures, classes):
    channels, size = PICTURES[pictures]
    try:
        network = stir(make(option, channels, size, classes))
    except ValueError as refusal:  # a size that the network cannot halve: one line with the value and the way out
        assert pictures != "cifar10", "every option takes 32x32"
        assert re.fullmatch(rf"image_size is {size} and .+: the size must be a multiple of \d+; choose .+", str(refusal))
        return
    x, time = batch(channels, size)
    F = network(x, time, told(network, 1, NULL))
    assert F.shape == x.shape and F.dtype == torch.float32 and F.isfinite().all()
    F.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        alone = size == 8 and re.search(r"\.[qk]\.", name)  # of a single pixel left, softmax is 1 whatever q and k are
        assert alone or parameter.grad.abs().sum() > 0, f"{name} is never used"


@every_option
def test_batch_independence(option):
    network = small(option, NULL)
    x, time = batch(1, network.image_size, count=3)
    cond = told(network, 0, NULL, 2)
    with torch.no_grad():
        together = network(x, time, cond)
        alone = torch.cat([network(x[i : i + 1], time[i : i + 1], cond[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5


@every_option
def test_labels(option):
    network = small(option, NULL)
    x, time = batch(1, network.image_size)
    with torch.no_grad():
        answers = [network(x, time, told(network, label, label)) for label in range(NULL + 1)]
    for i, answer in enumerate(answers):
        for other in answers[:i]:
            assert ((answer - other).abs().amax(dim=(1, 2, 3)) > 1e-5).all()
    if option in READERS:
        with pytest.raises(ValueError, match=r"tokens \[B, L, 6\] were expected, and given: (none|\[2\])"):
            network(x, time, torch.tensor([0, 1]) if option == "mmdit" else None)
        return
    with torch.no_grad():
        assert torch.equal(network(x, time), answers[NULL])
    with pytest.raises(ValueError, match="num_classes is 0"):
        small(option)(x, time, torch.tensor([0, 1]))


@every_option
def test_hint(option):
    """Further channels of x: told of them, F has the shape of the picture; with zero weights there, it is the plain network."""
    hinted = small(option, channels=3, hint_channels=3)
    cond = told(hinted, 1, 2)
    x, time = batch(3, hinted.image_size)
    hint = torch.randn_like(x)
    with torch.no_grad():
        answers = [hinted(torch.cat([x, h], dim=1), time, cond) for h in (hint, -hint)]
    assert answers[0].shape == x.shape and (answers[0] - answers[1]).abs().max() > 1e-5
    plain = small(option, channels=3)
    own = plain.state_dict()
    wider = {key: torch.zeros_like(value) for key, value in hinted.state_dict().items() if value.shape != own[key].shape}
    assert 1 <= len(wider) <= 2, "only what reads the picture"
    for key, weight in wider.items():
        weight[:, : own[key].shape[1]] = own[key]  # of patches, too: the picture's channels come first in each
    hinted.load_state_dict({**own, **wider})
    with torch.no_grad():
        silent, unheard = (hinted(torch.cat([x, h], dim=1), time, cond) for h in (0 * x, hint))
        assert torch.equal(silent, unheard) and (silent - plain(x, time, cond)).abs().max() < 1e-5


@every_option
def test_time(option):
    network = small(option)
    x, _ = batch(1, network.image_size)
    with torch.no_grad():
        early, late = (network(x, torch.tensor([time, 3.0]), told(network, 1, 2)) for time in (3.0, 4.0))
    gap = (early - late).abs().amax(dim=(1, 2, 3))
    assert gap[1] == 0
    assert gap[0] == 0 if option in TIMELESS else gap[0] > 1e-5


@every_option
def test_channels_last_gives_the_same(option):
    network = small(option, channels=3)  # of a single channel the two layouts are one
    x, time = batch(3, network.image_size)
    with torch.no_grad():
        plain = network(x, time, told(network, 1, 2))
        last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), time, told(network, 1, 2))
    assert (plain - last).abs().max() < 1e-4 * plain.abs().max()


@every_option
def test_forward_draws_nothing(option):
    """Dropout is the only user of the global generator."""
    network = small(option)
    x, time = batch(1, network.image_size)
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = (network(x, time, told(network, 1, 2)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


one_of_each_class = pytest.mark.parametrize("option", {node(option)["_target_"]: option for option in OPTIONS}.values())


@every_option
def test_a_fresh_network_answers_zero(option):
    network = make(option, 1, 28 if option == "unet_basic" else 32, NULL)
    x, time = batch(1, network.image_size)
    assert (network(x, time, told(network, 1, 2)).abs().max() == 0) == (option not in ("unet_basic", "unet_gated"))


@one_of_each_class
def test_it_learns_a_batch_by_heart(option):
    """What a few steps change: of noise, time and label it is to make a picture that goes with the label."""
    network = make(option, 1, 8 if option != "unet_basic" else 28, NULL)
    x, time = batch(1, network.image_size, count=4)
    cond, wanted = told(network, 0, 1, 2, 3), torch.linspace(-1, 1, 4)[:, None, None, None]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2 if option.startswith("edm2") else 3e-3)
    losses = []
    for _ in range(20):
        loss = (network(x, time / 1000, cond) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0], losses


@one_of_each_class
def test_bfloat16_is_nearly_the_same(option):
    """Under autocast, as on a GPU: forward and backward, no two kinds of number where there may be one."""
    network = small(option, NULL)
    x, time = batch(1, network.image_size)
    cond = told(network, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, time, cond).float()
    rough.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    with torch.no_grad():
        exact = network(x, time, cond)
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


@one_of_each_class
def test_one_graph_for_the_compiler(option):
    """Nothing breaks the graph, so that torch.compile may take the network whole. Tracing alone: no code is generated."""
    network = small(option, NULL)
    x, time = batch(1, network.image_size)
    torch._dynamo.reset()
    traced = torch.compile(network, backend="eager", fullgraph=True)
    cond = told(network, 1, 2)
    with torch.no_grad():
        assert (traced(x, time, cond) - network(x, time, cond)).abs().max() < 1e-5


@pytest.mark.parametrize("option", ["unet_tiny", "dit", "edm2", "uvit", "transformer", *READERS])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_reads_contiguous_channels(option, memory_format, monkeypatch):
    """The flash kernel of a CPU asks that the last dimension of q, k and v be contiguous."""
    seen = []
    attention = nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        seen.extend([q, k, v])
        assert attn_mask is None or attn_mask.shape[1:3] == (1, 1), "the same for all heads and questions, or it costs twice"
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    x, time = batch(1, 8)
    network = make(option, 1, 8)
    network(x.to(memory_format=memory_format), time, told(network, 1, 2))
    assert seen and all(tensor.stride(-1) == 1 for tensor in seen)


# --- the U-Net of DDPM ------------------------------------------------------------------------------------------------


def test_parameter_counts():
    with torch.device("meta"):
        assert parameters(make("unet", 3, 32)) == 35_746_307  # Ho et al. 2020: 35.7M
        assert parameters(make("unet_basic", 1, 28)) == 309_057  # the course's own count
        assert 1.5e6 < parameters(make("unet_small", 3, 32)) < 1.7e6
        assert parameters(make("unet_tiny", 1, 8)) < 2e5
        # Dhariwal and Nichol 2021, table 4 says 296M of 64x64: with 1000 classes and variances; here there is a null class more
        whole = {key: value for key, value in node("adm").items() if key != "_target_"}
        assert parameters(models.UNet(3, 64, 1000, variance_channels=3, **whole)) == 295_904_454 + 768
        one, two = parameters(make("unet", 3, 32)), parameters(make("unet", 3, 32, 10))
        assert two - one == 11 * 4 * 128  # ten classes and the null one


def diffusers_unet(network: models.UNet, option: str, **changes):
    """diffusers' network of the same shape."""
    mend_torchvision()
    diffusers = pytest.importorskip("diffusers")
    keys = {**node(option), **changes}
    attend = [level in keys["attention_levels"] for level in range(len(keys["multipliers"]))]
    joined = {"conv": ("DownBlock2D", "UpBlock2D"), "block": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    down, up = joined[keys["resize"]]
    return diffusers.UNet2DModel(
        sample_size=network.image_size,
        in_channels=network.channels,
        out_channels=network.channels,
        block_out_channels=tuple(keys["width"] * m for m in keys["multipliers"]),
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in attend),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in reversed(attend)),
        downsample_type={"conv": "conv", "block": "resnet"}[keys["resize"]],
        upsample_type={"conv": "conv", "block": "resnet"}[keys["resize"]],
        resnet_time_scale_shift={"add": "default", "scale_shift": "scale_shift"}[keys["time"]],
        attn_norm_num_groups=keys["groups"] if keys["time"] == "scale_shift" else None,
        layers_per_block=keys["blocks"],
        attention_head_dim=keys["head_width"],
        dropout=keys["dropout"],
        norm_num_groups=keys["groups"],
        norm_eps=keys["norm_eps"],
        flip_sin_to_cos=keys["time_order"] == "cos_sin",
        freq_shift=keys["time_shift"],
        downsample_padding={"end": 0, "both": 1}[keys["downsample_padding"]],
        num_class_embeds=network.num_classes + 1 if network.num_classes else None,
    )


@pytest.mark.parametrize("classes", [0, NULL])
@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("option", ["unet", "unet_attn", "unet2d", "adm"])
def test_unet_is_diffusers_unet2d(option, size, classes):
    """Same weights, same picture, same gradient; narrow, because the width changes no line of code."""
    changes = {"width": 32, "multipliers": [1, 2, 2, 4] if size == 32 else [1, 2, 2], "blocks": 2}
    changes |= {**SMALLER["adm"], "blocks": 2} if option == "adm" else {}
    changes["attention_levels"] = [level for level in node(option)["attention_levels"] if level < len(changes["multipliers"])]
    ours = make(option, 3, size, classes, **changes).eval()
    theirs = stir(diffusers_unet(ours, option, **changes)).eval()
    missing, unexpected = ours.load_state_dict({renamed(k): v for k, v in theirs.state_dict().items()}, strict=True)
    assert not missing and not unexpected

    x, time = batch(3, size)
    labels = torch.tensor([2, NULL]) if classes else None
    answers = []
    for network in (ours, lambda *a: theirs(*a).sample):
        leaf = x.clone().requires_grad_()
        F = network(leaf, time, labels)
        (F * x.flip(0)).sum().backward()
        answers.append((F.detach(), leaf.grad))
    for mine, other in zip(*answers, strict=True):
        assert (mine - other).abs().max() < 1e-5 * max(1, other.abs().max())
    assert answers[0][0].std() > 0.01  # two networks that answer 0 agree too


@pytest.mark.parametrize(("size", "patch"), [(28, 2), (24, 3)])
def test_unet_of_patches_is_a_unet_of_their_pixels_as_channels(size, patch):
    """Number c p^2 + i p + j of a place is channel c of the pixel in row i, column j of its patch."""
    changes = {"width": 32, "multipliers": [1, 2], "blocks": 1, "attention_levels": [0]}
    ours = stir(make("unet", 2, size, patch_size=patch, **changes)).eval()
    whole = make("unet", 2 * patch**2, size // patch, **changes).eval()
    whole.load_state_dict(ours.state_dict(), strict=True)
    x, time = torch.randn(2, 2, size, size), torch.tensor([3.0, 700.0])
    places = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # [B, C p p, h, w]
    F = whole(places, time).unflatten(1, (2, patch, patch)).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
    assert F.shape == x.shape and F.std() > 0.01
    assert torch.equal(ours(x, time), F)


def test_full_unets_have_the_shapes_of_diffusers():
    for option, size in [("unet", 32), ("unet2d", 64), ("adm", 64)]:
        with torch.device("meta"):
            ours = make(option, 3, size)
            theirs = diffusers_unet(ours, option, **SMALLER.get(option, {}))
        shapes = {renamed(name): value.shape for name, value in theirs.state_dict().items()}
        assert shapes == {name: value.shape for name, value in ours.state_dict().items()}


def test_fresh_unet_answers_zero_and_its_blocks_are_the_identity():
    network = make("unet_small", 3, 32).eval()
    x, time = batch(3, 32)
    assert network(x, time).abs().max() == 0
    h = torch.randn(2, 64, 8, 8)
    assert torch.equal(network.mid[0](h, torch.randn(2, 128)), h)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 36}, "width is 36 and groups is 32"),
        ({"attention_levels": [4]}, "attention_levels has 4 and multipliers has 4 levels"),
        ({"head_width": 48, "multipliers": [1, 2, 3]}, "head_width is 48 and level 1 has 256 channels"),
        ({"head_width": 48, "attention_levels": []}, "head_width is 48 and level 3 has 256 channels"),  # the middle
        ({"multipliers": []}, "multipliers is empty"),
        ({"patch_size": 3}, "image_size is 32 and patch_size is 3"),
        ({"patch_size": 8}, "image_size is 4 and multipliers has 4 levels"),
        ({"width": 33, "groups": 1}, "width is 33"),
        ({"multipliers": [1, 1, 1, 1, 1, 1, 1]}, "image_size is 32 and multipliers has 7 levels.*dataset.size=64"),
    ],
)
def test_unet_refuses_what_does_not_fit(changes, says):
    with torch.device("meta"), pytest.raises(ValueError, match=says):
        make("unet", 3, 32, **changes)


def test_sinusoids_are_the_papers():
    """DDPM's habit: sines first, frequencies from 1 to exactly 1/10000."""
    waves = sinusoids(torch.tensor([0.0, 1.0, 250.5]), 8, "sin_cos", 1)
    assert waves.shape == (3, 8)
    assert torch.equal(waves[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    angle = 250.5 * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 3)
    expected = torch.cat([angle.sin(), angle.cos()])
    assert (waves[2] - expected).abs().max() < 2e-5  # float32 of an angle of 250
    flipped = sinusoids(torch.tensor([1.0]), 8, "cos_sin", 1)[0]
    assert torch.equal(flipped, torch.cat([waves[1, 4:], waves[1, :4]]))


# --- the tutorials' networks ------------------------------------------------------------------------------------------


def test_basic_is_the_courses_network_between_two_changes_of_range():
    network = make("unet_basic", 1, 28)
    kernels = [(conv.in_channels, conv.out_channels, conv.kernel_size) for conv in [*network.down, *network.up]]
    assert kernels == [(a, b, (5, 5)) for a, b in [(1, 32), (32, 64), (64, 64), (64, 64), (64, 32), (32, 1)]]
    silu, conv2d = nn.functional.silu, nn.functional.conv2d
    unit = torch.rand(2, 1, 28, 28)  # the course's pictures, in [0, 1]
    d, u = ([(c.weight, c.bias) for c in half] for half in (network.down, network.up))
    a = silu(conv2d(unit, *d[0], padding=2))
    b = silu(conv2d(nn.functional.max_pool2d(a, 2), *d[1], padding=2))
    c = silu(conv2d(nn.functional.max_pool2d(b, 2), *d[2], padding=2))
    c = silu(conv2d(c, *u[0], padding=2))
    c = silu(conv2d(c.repeat_interleave(2, 2).repeat_interleave(2, 3) + b, *u[1], padding=2))
    c = silu(conv2d(c.repeat_interleave(2, 2).repeat_interleave(2, 3) + a, *u[2], padding=2))
    assert (network(2 * unit - 1, torch.zeros(2)) - (2 * c - 1)).abs().max() < 1e-5


def test_gated_has_the_tutorials_numbers():
    network = make("unet_gated", 3, 32)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters() if name.endswith("weight")}
    assert shapes["time_linear.weight"] == (192, 1)
    assert [shapes[f"down.{i}.conv_plain.weight"] for i in range(4)] == [(128, 3, 3, 3)] + 3 * [(128, 128, 3, 3)]
    assert [shapes[f"up.{i}.conv_gated.weight"][:2] for i in range(4)] == [(128, 160)] + 3 * [(128, 256)]
    assert shapes["bottom.0.weight"] == (128, 4 * 4 * 128 + 192)
    assert shapes["bottom.3.weight"] == (4 * 4 * 32, 128)
    assert shapes["conv_out.weight"] == (3, 128, 1, 1)
    assert shapes["down.0.gate.weight"] == (128, 192)

    sizes = []
    for block in [*network.down, *network.up]:
        block.register_forward_hook(lambda block, inputs, output: sizes.append(output.shape[-1]))
    network(*batch(3, 32))
    assert sizes == [32, 16, 8, 4, 4, 8, 16, 32]


def test_gate_multiplies_and_norm_is_over_channels():
    block = stir(make("unet_gated", 3, 32).down[1])
    x, features = torch.randn(2, 128, 4, 4), torch.randn(2, 192).relu()
    conv2d, relu = nn.functional.conv2d, torch.relu
    gate = relu(features @ block.gate.weight.T + block.gate.bias)[..., None, None]
    h = relu(conv2d(x, block.conv_gated.weight, block.conv_gated.bias, padding=1)) * gate
    h = h + conv2d(x, block.conv_plain.weight, block.conv_plain.bias, padding=1)
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    h = relu(h * block.norm.weight[:, None, None] + block.norm.bias[:, None, None])
    assert (block(x, features) - h).abs().max() < 1e-5


# --- the transformer --------------------------------------------------------------------------------------------------


def test_fresh_dit_answers_zero_and_its_blocks_are_the_identity():
    network = make("dit", 3, 32)
    assert network(*batch(3, 32)).abs().max() == 0
    h = torch.randn(2, 64, 128)
    assert torch.equal(network.blocks[0](h, torch.randn(2, 128)), h)


def test_dit_is_the_papers_formula():
    network = stir(make("dit", 1, 8, NULL, patch_size=4, width=32, depth=2, heads=2), seed=3).eval()
    x, time = batch(1, 8)
    labels = torch.tensor([1, NULL])

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attend(part, h):
        q, k, v = (t.unflatten(-1, (2, 16)) for t in part.qkv(h).chunk(3, dim=-1))  # [B, N, heads, d]
        weight = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
        return part.out(torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2))

    c = nn.functional.silu(network.time_embedding(time) + network.class_embedding.weight[labels])
    corners = [x[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)]
    h = network.patches_in(torch.stack(corners, dim=1)) + positions(2, 32, x.device)
    for block in network.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)[:, None].chunk(6, dim=-1)
        h = h + gate1 * attend(block.attention, norm(h) * (1 + scale1) + shift1)
        h = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
    shift, scale = network.modulation_out(c)[:, None].chunk(2, dim=-1)
    a, b, c, d = network.patches_out(norm(h) * (1 + scale) + shift).unflatten(2, (1, 4, 4)).unbind(1)
    expected = torch.cat([torch.cat([a, b], dim=3), torch.cat([c, d], dim=3)], dim=2)
    assert (network(x, time, labels) - expected).abs().max() < 1e-5


def test_dit_patches_keep_their_place():
    """With the transformer silent and the two patch maps inverse to each other, a picture comes back as it was."""
    network = make("dit", 2, 8, patch_size=4, width=32, depth=1)
    with torch.no_grad():
        network.patches_in.weight.copy_(torch.eye(32))
        network.patches_out.weight.copy_(torch.eye(32))
    network.norm_out = nn.Identity()
    place = positions(2, 32, torch.device("cpu"))
    network.patches_in.register_forward_hook(lambda linear, inputs, output: output - place)
    x, time = batch(2, 8)
    assert (network(x, time) - x).abs().max() < 1e-6
    tokens = []
    network.patches_in.register_forward_hook(lambda linear, inputs, output: tokens.append(inputs[0]))
    network(x, time)
    assert torch.equal(tokens[0][0, 1], x[0, :, :4, 4:].flatten())  # the second patch is the upper right one


def test_dit_sees_where_a_patch_is():
    """Without positions a transformer would answer swapped patches with swapped answers."""
    place = positions(4, 32, torch.device("cpu"))
    assert torch.cdist(place, place).fill_diagonal_(1).min() > 0.1
    network = stir(make("dit", 1, 8, patch_size=4, width=32, depth=1), seed=3).eval()
    x, time = batch(1, 8)
    assert (network(x.roll(4, 3), time) - network(x, time).roll(4, 3)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_size": 5}, "image_size is 32 and patch_size is 5.*dataset.size=35"),
        ({"heads": 3}, "width is 128 and heads is 3"),
        ({"width": 126, "heads": 2}, "width is 126"),
    ],
)
def test_dit_refuses_what_does_not_fit(changes, says):
    with torch.device("meta"), pytest.raises(ValueError, match=says):
        make("dit", 3, 32, **changes)
