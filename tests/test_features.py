"""Features: each extractor by what it promises; those of others with networks of their class and random weights, saved here."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import compose, train
from torch import Tensor, nn

from diffusion_cli.assembly import Facts
from diffusion_cli.build import build
from diffusion_cli.errors import ConfigError, StorageError, UserError
from diffusion_cli.features import Extractor, Features, inception
from diffusion_cli.finding import find, load_classifier
from diffusion_cli.vision import mend_torchvision

CPU = torch.device("cpu")


def facts(size: int = 8, channels: int = 1) -> Facts:
    return Facts(channels=channels, image_size=size, classes=list("0123456789"), taught=[], fingerprint="")


def opened(*words: str, of: Facts | None = None) -> Extractor:
    node = compose("ckpt=x", *words, primary="evaluate")["features"]
    return build(node, Features, "features").open(of or facts(), CPU)


def pictures(count: int = 5, size: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# -- pixels and random networks ----------------------------------------------------------------------------------------


def test_raw_is_the_pixels() -> None:
    images = pictures()
    assert torch.equal(opened("features=raw")(images).features, images.flatten(1) / 127.5 - 1)


def test_a_projection_keeps_distances_and_is_the_same_everywhere() -> None:
    images, of = pictures(20, 32, 3), facts(32, 3)
    look = opened("features=raw", "features.dimensions=1000", of=of)
    small, x = look(images).features, images.flatten(1) / 127.5 - 1
    assert small.shape == (20, 1000)
    ratio = torch.pdist(small) / torch.pdist(x)
    assert ratio.mean() == pytest.approx(1, abs=0.02) and ratio.std() < 0.05
    assert look.digest == opened("features=raw", "features.dimensions=1000", of=of).digest
    assert look.digest != opened("features=raw", "features.dimensions=1000", "features.seed=1", of=of).digest


def test_random_features_see_pictures_one_by_one() -> None:
    look, images = opened("features=random", "features.width=8"), pictures()
    whole = look(images).features
    assert whole.shape == (5, 14 * 8) and whole.isfinite().all() and (whole.std(0) > 0).float().mean() > 0.9
    assert torch.allclose(torch.cat([look(images[i : i + 1]).features for i in range(5)]), whole, atol=1e-6)
    assert look.digest == opened("features=random", "features.width=8").digest
    assert look.digest != opened("features=random", "features.width=8", "features.seed=3").digest


# -- a classifier of our own -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("objective=classifying", "model=classifier", "dataset.labels=true", "model.head_width=8")
    return train(tmp_path_factory.mktemp("runs"), *words, "model.multipliers=[1,1]", "model.attention_levels=[]", name="judge")


def test_classifier_features_are_what_the_last_map_reads(classifier: Path) -> None:
    look, images = opened("features=classifier", f"features.ckpt={classifier}"), pictures()
    seen = look(images)
    network = load_classifier(find(classifier), "ema").network
    with torch.no_grad():
        logits = network(images / 127.5 - 1, torch.zeros(5))
        assert seen.logits is not None and torch.allclose(seen.logits, logits, atol=1e-6)
        assert torch.allclose(network.logits(seen.features), logits, atol=1e-6)
    assert look.classes == list("0123456789") and look.digest == find(classifier).digest[:16]


def test_a_classifier_of_other_pictures_is_refused(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size is 8 there and 32 in this run"):
        opened("features=classifier", f"features.ckpt={classifier}", of=facts(32))
    denoiser = train(tmp_path)
    with pytest.raises(ConfigError, match="is no classifier"):
        opened("features=classifier", f"features.ckpt={denoiser}")


# -- Inception ---------------------------------------------------------------------------------------------------------


def inception_weights() -> nn.Module:
    """torch-fidelity's network with random weights: it has no constructor that does not load a file."""
    mend_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as library

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.torch, "load", lambda *given, **named: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        return library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], "none")


@pytest.fixture(scope="module")
def saved_inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    network, path = inception_weights(), tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_is_the_librarys(saved_inception: tuple[nn.Module, Path]) -> None:
    """Grey pictures are the same in all channels; other weights than the published are not called inception."""
    network, path = saved_inception
    look, images = opened("features=inception", f"features.path={path}", "features.sha256=null"), pictures(2)
    seen = look(images)
    features, logits = network(images.repeat(1, 3, 1, 1))
    assert torch.equal(seen.features, features) and seen.logits is not None and torch.equal(seen.logits, logits)
    assert seen.features.shape == (2, 2048) and look.name == "inception_other"
    assert look.digest == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_published_inception_weights_are_known(
    saved_inception: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved_inception
    with pytest.raises(StorageError, match="is not the published file"):
        opened("features=inception", f"features.path={path}")
    assert inception.FILE.endswith(f"-{inception.SHA256[:8]}.pth")
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert opened("features=inception", f"features.path={path}", "features.sha256=null").name == "inception"


def test_inception_weights_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"conv": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(StorageError, match="cannot be read"):
        opened("features=inception", f"features.path={tmp_path / 'weights.pth'}", "features.sha256=null")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("words", "command"), [
    (("features=inception",), r"curl -L --create-dirs -o \S+6726825d.pth https://\S+6726825d.pth"),
    (("features=dinov2",), r"hf download facebook/dinov2-large --revision main"),
    (("features=clip",), r"hf download openai/clip-vit-large-patch14 --revision main"),
])  # fmt: skip
def test_missing_weights_are_answered_with_both_ways_out(
    words: tuple[str, ...], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        opened(*words)
    assert re.search(command, str(caught.value)) and "features=classifier" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_inception_is_looked_for_where_torch_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (("TORCH_HOME", "/some/torch"), ("XDG_CACHE_HOME", "/some/cache")):
        with monkeypatch.context() as patch:
            patch.delenv("TORCH_HOME", raising=False)
            patch.setenv(*home)
            assert inception._cached() == Path(torch.hub.get_dir(), "checkpoints", inception.FILE)


# -- the hub's ---------------------------------------------------------------------------------------------------------


def of_hub(kind: str) -> nn.Module:
    """A network of the class that the hub's weights are for, small."""
    mend_torchvision()
    import transformers

    torch.manual_seed(0)
    if kind == "dinov2":
        return transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)
        ).eval()
    words = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**words, patch_size=56)).eval()


@pytest.mark.parametrize(("kind", "width"), [("dinov2", 32), ("clip", 24)])
def test_hub_networks_see_what_their_own_processor_shows_them(kind: str, width: int, tmp_path: Path) -> None:
    """Beside transformers' image processor, which resizes by Pillow: the same to its rounding, a grey level here and there."""
    from PIL import Image

    network = of_hub(kind)
    network.save_pretrained(tmp_path)
    look, images = opened(f"features={kind}", f"features.path={tmp_path}"), pictures(3, 32, 3)
    found = look(images).features
    assert found.shape == (3, width)
    assert look.digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()[:16]
    resized = [Image.fromarray(one.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC) for one in images]
    import numpy as np

    x = torch.from_numpy(np.stack([np.asarray(one) for one in resized])).permute(0, 3, 1, 2) / 255
    mean, std = {
        "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    }[kind]
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        answer = network(pixel_values=x)
    expected = answer.pooler_output if kind == "dinov2" else answer.image_embeds
    assert torch.allclose(found, expected, atol=0.01), (found - expected).abs().max()
    assert (found - expected[[1, 2, 0]]).abs().max() > 0.2, "pictures are told apart"


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        opened("features=clip", f"features.path={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StorageError, match="cannot be used"):
        opened("features=clip", f"features.path={tmp_path}")
