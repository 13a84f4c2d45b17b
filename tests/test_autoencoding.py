"""Autoencoders: what they are charged, what passes their bottleneck, the scale of their latents, and how they are judged."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny import compose, figures, hashes, stopped, train
from torch import Tensor

from diffusion_cli import config, pairs
from diffusion_cli.assembly import Facts, objective_of
from diffusion_cli.codecs import Codec, Latent, Pixels
from diffusion_cli.data import Batch, Pictures
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.errors import ConfigError
from diffusion_cli.evaluation.reconstruction import psnr, ssim
from diffusion_cli.evaluation.run import evaluate
from diffusion_cli.evaluation.words import higher_is_better
from diffusion_cli.finding import dataset_of, find, load_codec, load_denoiser
from diffusion_cli.models.autoencoder import AutoencoderKL, AutoencoderVQ, kl
from diffusion_cli.models.codebook import Codebook
from diffusion_cli.objectives import Autoencoding
from diffusion_cli.randomness import Source

KL = ("objective=autoencoding", "model=autoencoder_kl", "model.widths=[8,8]", "model.groups=4", "model.latent_channels=3")
VQ = ("objective=autoencoding", "model=autoencoder_vq", "model.widths=[8,8]", "model.groups=4", "model.latent_channels=3",
      "model.codes=16")  # fmt: skip
KINDS = pytest.mark.parametrize("words", [KL, VQ], ids=["kl", "vq"])
NOT_OF_THE_UNET = ("model.multipliers=DEFAULT", "model.width=DEFAULT")


def run(outputs: Path, *more: str) -> Path:
    return train(outputs, *NOT_OF_THE_UNET, *more)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objective(*more: str) -> Autoencoding:
    made = objective_of(
        config.check_train(compose(*more)).node, Facts(channels=1, image_size=8, classes=[], taught=[], fingerprint="")
    )
    assert isinstance(made, Autoencoding)
    return made


def pictures(count: int) -> Pictures:
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Pictures(images, None, ())


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_kl_is_that_of_torchs_normal_distributions() -> None:
    mean, log_variance = normal(2, 3, 4, 4).double(), normal(2, 3, 4, 4, seed=1).double()
    there = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    wanted = torch.distributions.kl_divergence(there, torch.distributions.Normal(0.0, 1.0))
    assert (kl(mean, log_variance) - wanted).abs().max() < 1e-12
    assert not kl(torch.zeros(3), torch.zeros(3)).any()


def test_the_loss_of_a_kl_autoencoder_is_that_of_its_parts() -> None:
    """The error, a mean, and the KL, a sum over latents divided by the number of pixels and channels."""
    made = objective(*KL, "model.kl_weight=0.3", "loss/norm@objective.norm=mse")
    source, x = Source(0, torch.arange(6)), to_float(pictures(6).images)
    loss, tallies = made.loss(Batch(x, None, torch.arange(6)), source)
    network = made.network
    mean, log_variance = network.moments(x)
    z = mean + torch.exp(log_variance / 2) * source.normal("latents", (3, 4, 4))
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
    wanted = (network.decode(z) - x).square().flatten(1).mean(1) + 0.3 * divergence / 64
    assert (loss - wanted).abs().max() < 1e-5
    bits = divergence.detach().mean() / math.log(2) / (3 * 4 * 4)
    assert float(tallies["kl_bits_per_latent"].sums) == pytest.approx(float(bits), rel=1e-5)


def test_codes_are_the_nearest_and_the_gradient_passes_straight_through() -> None:
    book, z = Codebook(7, 2, 0.9), normal(3, 2, 4, 4).requires_grad_()
    torch.nn.init.normal_(book.embedding.weight, generator=torch.Generator().manual_seed(1))
    found = book(z)
    vectors = z.detach().movedim(1, 3).reshape(-1, 2)
    wanted = book.embedding.weight[torch.cdist(vectors.double(), book.embedding.weight.double()).argmin(1)]
    assert (found.quantised.detach().movedim(1, 3).reshape(-1, 2) - wanted).abs().max() < 1e-6
    slope = normal(3, 2, 4, 4, seed=2)
    (found.quantised * slope).sum().backward()
    assert torch.equal(z.grad, slope)
    counts = torch.bincount(book.nearest(z)[1], minlength=7) / 16
    assert (found.shares[1] - counts).abs().max() < 1e-6


def test_who_is_drawn_to_whom() -> None:
    """to_code moves vectors alone, to_vector codes alone: the stop-gradients of van den Oord et al. 2017, equation 3."""
    book, z = Codebook(5, 2, None), normal(2, 2, 2, 2).requires_grad_()
    found = book(z)
    to_z, to_codes = torch.autograd.grad(found.to_code.sum(), [z, book.embedding.weight], allow_unused=True, retain_graph=True)
    codes = found.quantised.detach()
    assert to_codes is None and (to_z - 2 * (z.detach() - codes) / 8).abs().max() < 1e-6
    to_z, to_codes = torch.autograd.grad(found.to_vector.sum(), [z, book.embedding.weight], allow_unused=True)
    assert to_z is None and to_codes.abs().sum() > 0
    assert torch.allclose(found.to_code, (z - codes).square().flatten(1).mean(1))
    assert not Codebook(5, 2, 0.9)(z).to_vector.any()


def test_codes_move_to_the_average_of_what_falls_to_them() -> None:
    book, z = Codebook(2, 1, 0.75), torch.tensor([0.0, 0.4, 1.0, 1.2]).view(4, 1, 1, 1)
    book.embedding.weight.data = torch.tensor([[0.0], [1.0]])
    book.counts.copy_(torch.tensor([2.0, 2.0]))
    book.sums.copy_(torch.tensor([[0.0], [2.0]]))
    book.update(z, Source(0, torch.arange(4)))
    # n = 0.75 * 2 + 0.25 * 2 = 2;  m = 0.75 * (0, 2) + 0.25 * (0.4, 2.2)
    assert torch.allclose(book.counts, torch.tensor([2.0, 2.0]))
    assert torch.allclose(book.embedding.weight[:, 0], torch.tensor([0.1 / 2, 2.05 / 2]))


def test_codes_out_of_use_are_placed_on_vectors_of_the_batch() -> None:
    book, z = Codebook(8, 2, 0.99), 5 + normal(16, 2, 2, 2)
    book.update(z, Source(0, torch.arange(16)))
    there = (book.embedding.weight[:, None] - z.movedim(1, 3).reshape(-1, 2)).abs().sum(2).min(1).values  # [8]
    assert (there < 1e-5).sum() >= 7, "the first batch finds the first codes"  # the eighth had all vectors: their mean
    kept = book.embedding.weight.clone()
    for step in range(1, 20):
        book.update(z, Source(0, torch.arange(16), step))
    assert (book.nearest(z).flatten().bincount(minlength=8) > 0).all(), "all are used"
    assert not torch.equal(book.embedding.weight, kept)


def test_perplexity_counts_codes_used_equally() -> None:
    network = AutoencoderVQ(1, 8, widths=(8, 8), groups=4, codes=8)
    even = network.figures(torch.tensor([0.25] * 4 + [0.0] * 4))
    assert float(even["codebook_perplexity"]) == pytest.approx(4, rel=1e-6) and float(even["codebook_use"]) == 0.5
    assert float(network.figures(torch.eye(8)[3])["codebook_perplexity"]) == 1


@pytest.mark.parametrize("size", [8, 11, 32])
def test_ssim_is_that_of_gaussian_filters(size: int) -> None:
    """Against scipy's filter, written out from Wang et al. 2004; scipy cuts its window at `radius`."""
    x = normal(3, 2, size, size).double().clamp(-1, 1)
    y = (x + 0.3 * normal(3, 2, size, size, seed=1)).clamp(-1, 1)
    radius = min(5, (size - 1) // 2)

    def blur(f: Any) -> Any:
        full = gaussian_filter(f, 1.5, radius=radius, mode="constant")
        return full[radius : size - radius, radius : size - radius]

    wanted = np.empty((3, 2))
    for i in range(3):
        for c in range(2):
            a, b = x[i, c].numpy(), y[i, c].numpy()
            m_a, m_b = blur(a), blur(b)
            v_a, v_b, cov = blur(a * a) - m_a**2, blur(b * b) - m_b**2, blur(a * b) - m_a * m_b
            c1, c2 = 0.02**2, 0.06**2
            wanted[i, c] = np.mean((2 * m_a * m_b + c1) * (2 * cov + c2) / ((m_a**2 + m_b**2 + c1) * (v_a + v_b + c2)))
    assert np.abs(ssim(x, y).numpy() - wanted.mean(1)).max() < 1e-10
    assert torch.allclose(ssim(x, x), torch.ones(3, dtype=x.dtype))


def test_psnr_of_a_constant_error() -> None:
    x = normal(2, 1, 4, 4)
    assert psnr(x, x + 0.02).tolist() == pytest.approx([40, 40], abs=1e-3)
    assert higher_is_better("evaluate/psnr") and higher_is_better("evaluate/codebook_use")
    assert not higher_is_better("evaluate/kl_bits_per_latent") and not higher_is_better("evaluate/mse")
    assert psnr(x, x).tolist() == pytest.approx([10 * math.log10(4e10)] * 2)


# -- codecs ------------------------------------------------------------------------------------------------------------


def test_pixels_are_the_identity() -> None:
    x, codec = normal(2, 3, 4, 4), Pixels()
    assert codec.shape(3, 4) == (3, 4, 4) and torch.equal(codec.decode(codec.encode(x)), x)


@KINDS
def test_latents_are_standardised_and_come_back(words: tuple[str, ...]) -> None:
    made = objective(*words).eval()
    made.settle(pictures(40), batch=16)
    codec, x = made.autoencoder, to_float(pictures(40).images)
    with torch.no_grad():
        latents = codec.encode(x)
        assert latents.shape[1:] == codec.shape(1, 8) == (3, 4, 4)
        across = latents.transpose(0, 1).flatten(1)
        assert across.mean(1).abs().max() < 1e-4 and (across.std(1, unbiased=False) - 1).abs().max() < 1e-4
        straight = codec.network(x, torch.zeros(40, 3, 4, 4)).y
        assert (codec.decode(latents) - straight).abs().max() < 1e-4
    assert codec.shape(1, 16) == (3, 8, 8) == tuple(codec.encode(torch.zeros(1, 1, 16, 16)).shape[1:])
    for wrong in ((1, 9), (3, 8)):
        with pytest.raises(ValueError, match=r"multiples of 2, .* choose dataset\.size=8"):
            codec.shape(*wrong)


def test_samples_of_latents_are_counted() -> None:
    codec = Latent(AutoencoderKL(1, 8, widths=(8, 8), groups=4))
    x, source = to_float(pictures(6).images), Source(3, torch.arange(6))
    with torch.no_grad():
        whole = codec.encode(x, source)
        parts = torch.cat([codec.encode(x[i : i + 2], Source(3, torch.arange(i, i + 2))) for i in (0, 2, 4)])
        assert (whole - parts).abs().max() < 1e-5 and not torch.allclose(whole, codec.encode(x))
        mean, log_variance = codec.network.moments(x)
        assert torch.equal(whole, mean + torch.exp(log_variance / 2) * source.normal("latents", (4, 4, 4)))


def test_weights_fit_the_classes_of_diffusers() -> None:
    import diffusers

    x = to_float(pictures(2).images)
    for network, kind in (
        (AutoencoderKL(1, 8, widths=(8, 8), groups=4), diffusers.AutoencoderKL),
        (AutoencoderVQ(1, 8, widths=(8, 8), groups=4, codes=8), diffusers.VQModel),
    ):
        there = kind.from_config(network.peer.config)
        weights = {k: v for k, v in network.peer.state_dict().items() if k not in ("quantize.counts", "quantize.sums")}
        there.load_state_dict(weights)
        with torch.no_grad():
            wanted = there.eval()(x).sample
            assert (network.eval()(x, torch.zeros(2, 4, 4, 4)).y - wanted).abs().max() < 1e-5


# -- training ----------------------------------------------------------------------------------------------------------


@KINDS
def test_it_trains_resumes_to_the_bit_and_can_be_asked(words: tuple[str, ...], tmp_path: Path) -> None:
    base = (*words, "dataset.limit=0", "trainer.steps=60", "trainer.batch=32", "ema=none", "trainer.report_every=20",
            "trainer.evaluate_every=20", "trainer.save_every=0", "trainer.evaluate=64", "optimizer.lr=3e-3")  # fmt: skip
    whole = run(tmp_path / "whole", *base)
    rows = figures(whole)
    told = [row["evaluate/psnr"] for row in rows if "evaluate/psnr" in row]
    assert told[-1] > told[0] + 1
    own = {"kl_bits_per_latent"} if words is KL else {"codebook_perplexity", "codebook_use"}
    assert all({f"{place}/{name}" for name in own} <= set().union(*rows) for place in ("train", "evaluate"))
    assert Image.open(whole / "samples" / "reconstructions_00000060.png").width > 200
    stopped(tmp_path / "parts", 33, *NOT_OF_THE_UNET, *base)
    parts = run(tmp_path / "parts", *base)
    assert hashes(parts) == hashes(whole) and figures(parts) == rows

    codec = load_codec(find(whole), "ema")
    assert isinstance(codec, Codec) and not any(p.requires_grad for p in codec.parameters())
    from diffusion_cli.build import build
    from diffusion_cli.data import Dataset

    data = build(compose()["dataset"], Dataset, "dataset").load("train")
    assert data is not None
    with torch.no_grad():
        x = codec.encode(to_float(data.images)).transpose(0, 1).flatten(1)
    assert x.mean(1).abs().max() < 1e-3 and (x.std(1) - 1).abs().max() < 1e-3, "the checkpoint carries the scale"


def measured(run: Path, *words: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    line = (f"ckpt={run}", "batch=24", "device=cpu", *words)
    kept = json.loads(evaluate(config.check_evaluate(compose(*line, primary="evaluate"))).read_text())
    return kept["figures"], kept["made_by"]


def test_reconstructions_are_measured_beside_the_pictures(tmp_path: Path) -> None:
    """The run's own figures of the same pictures; and distances of two clouds that are made here by hand."""
    there = run(tmp_path, *KL, "trainer.steps=4", "trainer.evaluate=40", "trainer.metrics=[fid]", "features=raw")
    words = ("metrics=[reconstruction,fid,kid,sliced_wasserstein]", "features=raw")
    found, made_by = measured(there, *words)
    logged = {name: value for row in figures(there) for name, value in row.items()}
    for name in ("psnr", "ssim", "mae", "mse"):
        assert found[name]["value"] == pytest.approx(logged[f"evaluate/{name}"], rel=1e-5) and found[name]["error"] > 0
    assert made_by["of"] == "reconstructions" and made_by["split"] == "test" and made_by["features"]["name"] == "raw"
    parts, _ = measured(there, *words, "batch=7", f"out={tmp_path / 'parts.json'}")
    assert list(parts) == list(found)
    for name, figure in found.items():
        assert parts[name]["value"] == pytest.approx(figure["value"], rel=1e-3), name

    held_out = dataset_of(find(there), None).load("test")
    assert held_out is not None
    images = held_out.images
    assert len(images) == made_by["n"] == 40
    codec = load_codec(find(there), "ema")
    back = to_uint8(codec.decode(codec.encode(to_float(images))))
    one, two = (part.flatten(1).double() / 127.5 - 1 for part in (back, images))
    gap = (one.mean(0) - two.mean(0)).square().sum()
    roots = torch.linalg.eigvals(torch.cov(one.T) @ torch.cov(two.T)).real.clamp(min=0).sqrt()
    wanted = float(gap + torch.cov(one.T).trace() + torch.cov(two.T).trace() - 2 * roots.sum())
    assert found["reconstruction_raw_fd_40"]["value"] == pytest.approx(wanted, rel=1e-3)
    assert logged["evaluate/reconstruction_raw_fd_40"] == pytest.approx(wanted, rel=1e-3), "and while training"


def test_a_perfect_autoencoder_is_at_no_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = run(tmp_path, *KL, "trainer.steps=2")
    monkeypatch.setattr(Latent, "encode", lambda self, pictures, source=None: pictures)
    monkeypatch.setattr(Latent, "decode", lambda self, x: x)
    found, _ = measured(there, "metrics=[reconstruction,fid,precision,sliced_wasserstein]", "features=raw", "n=40")
    assert found["psnr"]["value"] > 100 and found["mae"]["value"] == 0
    assert (
        abs(found["reconstruction_raw_fd_40"]["value"]) < 1e-3
        and found["reconstruction_pixels_sliced_wasserstein_40"]["value"] == 0
    )
    assert found["reconstruction_raw_precision_40"]["value"] == 1


def test_what_an_autoencoder_has_no_figure_of_is_named(tmp_path: Path) -> None:
    there = run(tmp_path, *KL, "trainer.steps=2")
    with pytest.raises(ConfigError, match=r"metrics=denoising,bound: of a denoiser, .*\[reconstruction,fid\]"):
        measured(there)
    with pytest.raises(ConfigError, match="metrics=clip_score"):
        measured(there, "metrics=[clip_score]", "features=raw")
    with pytest.raises(ConfigError, match="no autoencoder but a denoiser"):
        measured(train(tmp_path, name="denoiser"), "metrics=[reconstruction]")


def test_the_wrong_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no denoiser but an autoencoder: .*samples"):
        load_denoiser(find(run(tmp_path, *KL, "trainer.steps=2")), "ema")
    with pytest.raises(ConfigError, match="no autoencoder but a denoiser: train one with experiment=autoencoder_digits"):
        load_codec(find(train(tmp_path, name="denoiser")), "ema")


@pytest.mark.parametrize(("words", "said"), [
    ({"widths": ()}, "widths is empty"), ({"widths": (8, 8, 8, 8, 8)}, "must be a multiple of 16"),
    ({"widths": (8, 12)}, "multiples of groups"),
])  # fmt: skip
def test_a_network_that_cannot_be(words: dict[str, Any], said: str) -> None:
    for kind in (AutoencoderKL, AutoencoderVQ):
        with pytest.raises(ValueError, match=said):
            kind(1, 8, **words)


def test_diffusers_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    node = compose(*KL)
    monkeypatch.setattr(pairs, "find_spec", lambda name: None if name == "diffusers" else there(name))
    with pytest.raises(ConfigError, match=r"diffusers: pip install 'diffusion-cli\[diffusers\]'"):
        config.check_train(node)
