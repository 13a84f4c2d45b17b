"""Exports of networks that read texts or work in latents: graphs of all their parts, and pipelines of diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import asked, blocks, run_python
from test_text_to_image import Place, place  # noqa: F401 (a fixture)
from tiny import train
from torch import Tensor

from diffusion_cli.codecs import Latent
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting import graphs
from diffusion_cli.exporting.diffusers_beside import vae_of
from diffusion_cli.exporting.parts import Texts
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.models import AutoencoderKL, AutoencoderVQ
from diffusion_cli.stages import stages_of

pytest.importorskip("tokenizers")
TEXTS = [
    "a red square",
    "",
    "A  blue <|end|> square",
    "a red square at the top left and then zebras and walruses and many more",
]


def answers(folder: Path, form: str, name: str, inputs: dict[str, Tensor]) -> Tensor:
    if form == "torch_export":
        return torch.export.load(folder / f"{name}.pt2").module()(*inputs.values())
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    assert [given.name for given in session.get_inputs()] == list(inputs)
    return torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])


@pytest.mark.parametrize("form", [pytest.param("torch_export", marks=pytest.mark.slow), "onnx"])
@pytest.mark.filterwarnings("ignore::diffusion_cli.conditioning.PromptCut")
def test_every_part_answers_as_in_the_run(place: Place, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The network, the encoder of texts with its tokenizer, and both halves of the autoencoder; then the card's own lines."""
    from tokenizers import Tokenizer

    run, end = place.outputs / "run", {"torch_export": "pt2", "onnx": "onnx"}[form]
    folder = asked(run, f"to={form}", f"out={tmp_path / 'it'}", "steps=3")
    held = {path.name for path in folder.iterdir() if path.suffix != ".data"}
    names = ("network", "texts", "encoder", "decoder")
    assert held == {*(f"{name}.{end}" for name in names), "walk.json", "tokenizer.json", "null.npy", "README.md", "export.json",
                    "samples.png"}  # fmt: skip
    denoiser, stages = load_denoiser(find(run), "ema"), stages_of(find(run))
    assert stages.texts is not None and np.array_equal(np.load(folder / "null.npy"), denoiser.null.numpy())
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.encode_special_tokens = True
    for texts in (TEXTS, TEXTS[:1]):
        known, words = stages.texts.tokenised(texts), found.encode_batch(texts)
        assert [text.ids for text in words] == known.ids.tolist()
        assert [text.attention_mask for text in words] == known.mask.long().tolist()
        tokens = stages.texts.encode(texts)
        assert (answers(folder, form, "texts", {"ids": known.ids, "mask": known.mask}) - tokens).abs().max() < 1e-5
        with torch.no_grad():
            x, pictures = torch.randn(len(texts), 2, 8, 8), 2 * torch.rand(len(texts), 3, 16, 16) - 1
            for length in (20, 4):
                given = {"x": x, "time": 900 * torch.rand(len(texts)), "tokens": tokens[:, :length]}
                wanted = denoiser.network(*given.values())
                assert wanted.abs().max() > 1e-4 and (answers(folder, form, "network", given) - wanted).abs().max() < 1e-5
            for name, given, made in (
                ("encoder", {"pictures": pictures}, stages.codec.encode(pictures)),
                ("decoder", {"x": x}, stages.codec.decode(x)),
            ):
                assert (answers(folder, form, name, given) - made).abs().max() < 1e-5 * max(1, made.abs().max())
    monkeypatch.chdir(folder)
    made = run_python(folder)
    assert Image.open("picture.png").size == (16, 16) and made["pictures"].shape == (16, 3, 16, 16)
    (walk,) = [json.loads((folder / "walk.json").read_text())]
    assert not walk["clip"], "latents have no bounds"
    with torch.no_grad():
        draws = np.random.default_rng(0).standard_normal((16, 2, 8, 8), dtype=np.float32)
        of_torch = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        x = walk["start"] * (of_torch if form == "torch_export" else torch.from_numpy(draws))
        tokens = stages.texts.encode(["a red square"]).expand(16, -1, -1)
        for move in walk["moves"]:
            x0, empty = (denoiser(x, torch.tensor(move["t"]), said) for said in (tokens, None))
            x0 = empty + 4 * (x0 - empty)
            x = move["x_of_x"] * x + move["x_of_x0"] * x0
        pixels = ((stages.codec.decode(x).clip(-1, 1) + 1) * 127.5).round()
    assert np.abs(np.asarray(made["pictures"], dtype=float) - pixels.numpy()).max() <= 1


@pytest.mark.slow
def test_without_what_makes_tokens_the_card_says_so(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def forward(self: Texts, ids: Tensor, mask: Tensor) -> Tensor:
        return ids[: int(ids.sum().item())]

    monkeypatch.setattr(Texts, "forward", forward)
    folder = asked(place.outputs / "run", "to=torch_export", f"out={tmp_path / 'it'}", "steps=1")
    assert not (folder / "texts.pt2").exists() and not (folder / graphs.WORDS).exists()
    assert "Without what makes tokens of texts (torch.export cannot trace Texts" in (folder / "README.md").read_text()
    assert "null.npy" in blocks(folder, "python")[0]
    monkeypatch.chdir(folder)
    assert run_python(folder)["pictures"].shape == (16, 3, 16, 16)


# -- diffusers ---------------------------------------------------------------------------------------------------------

NOISY = ("schedule=cosine", "prediction=eps", "sampler=ddim", "dataset.labels=false", "trainer.steps=2", "optimizer.lr=1e-2")
EDM = ("schedule=edm", "prediction=edm", "loss=edm", *NOISY[3:])
SMALL_UNET = ("model.width=8", "model.groups=4", "model.multipliers=[1,2]")
CONDITION = ("model=unet2d_condition", "model.block_out_channels=[8,16]",
             "model.down_block_types=[DownBlock2D,CrossAttnDownBlock2D]",
             "model.up_block_types=[CrossAttnUpBlock2D,UpBlock2D]", "model.norm_num_groups=4",
             "model.attention_head_dim=2")  # fmt: skip
PEERS = {  # run -> words, pipeline
    "sd": ((*CONDITION, *NOISY, "texts=clip", "texts.masked=false"), "StableDiffusionPipeline"),
    "dit_latents": (("model=dit", "model.width=16", "model.depth=1", "model.heads=2", "model.patch_size=2",
                     "model.time_shift=1", *NOISY), "DiTPipeline"),
    "ldm": ((*SMALL_UNET, *NOISY), "LDMPipeline"),
    "ldm_edm": ((*SMALL_UNET, *EDM), "LDMPipeline"),
    "sd_edm": ((*CONDITION, *EDM, "texts=clip", "texts.masked=false"), "StableDiffusionPipeline"),
    "flow": ((*SMALL_UNET, *NOISY[3:]), None),
}  # fmt: skip


def peer_run(place: Place, name: str, words: tuple[str, ...]) -> Path:  # noqa: F811
    if not (place.outputs / name).exists():
        ckpts = ["codec=latents", f"codec.ckpt={place.outputs / 'codec'}"]
        ckpts += [f"texts.ckpt={place.outputs / 'clip'}"] * ("texts=clip" in words)
        train(place.outputs, *place.common, *ckpts, *words, name=name)
    return place.outputs / name


QUICK = ("sd", "dit_latents")


@pytest.mark.filterwarnings("ignore::diffusion_cli.conditioning.PromptCut")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in PEERS])
def test_diffusers_draws_what_we_draw(place: Place, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Its classes load the folder; every part answers as ours, the card's lines draw our pictures, and it comes back."""
    import diffusers

    words, pipeline = PEERS[name]
    run = peer_run(place, name, words)
    folder = asked(run, "to=diffusers", f"out={tmp_path / 'it'}", "weights=raw")
    index = folder / "model_index.json"
    assert (json.loads(index.read_text())["_class_name"] if index.exists() else None) == pipeline
    denoiser, stages = load_denoiser(find(run), "raw"), stages_of(find(run))
    x, time, pictures = torch.randn(3, 2, 8, 8), 999 * torch.rand(3), 2 * torch.rand(3, 3, 16, 16) - 1
    told = None if stages.texts is None else stages.texts.encode(TEXTS[:3])
    vae = diffusers.AutoencoderKL.from_pretrained(folder / ("vqvae" if pipeline == "LDMPipeline" else "vae"))
    kind = {"sd": "UNet2DConditionModel", "dit": "DiTTransformer2DModel"}.get(name.partition("_")[0], "UNet2DModel")
    network = getattr(diffusers, kind).from_pretrained(folder / ("transformer" if name == "dit_latents" else "unet"))
    more = {"encoder_hidden_states": told} if told is not None else {"class_labels": torch.zeros(3, dtype=torch.long)}
    with torch.no_grad():
        wanted = denoiser.network(x, time, told)
        assert wanted.std() > 1e-3
        assert (network(x, timestep=time, **({} if kind == "UNet2DModel" else more)).sample - wanted).abs().max() < 1e-5
        for mine, theirs in (
            (stages.codec.decode(x), vae.decode(x / vae.config.scaling_factor).sample),
            (stages.codec.encode(pictures), vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor),
        ):
            assert (mine - theirs).abs().max() < 1e-5 * max(1, mine.abs().max())
        network_of_codec = stages.codec.network
        deviation = torch.exp(network_of_codec.moments(pictures)[1] / 2) / stages.codec.std[:, None, None]
        assert (vae.encode(pictures).latent_dist.std - deviation).abs().max() < 1e-5 * deviation.max()

        monkeypatch.chdir(folder)
        made = run_python(folder)
        if stages.texts is not None:
            texts = made["pipeline"].encode_prompt(TEXTS[:1] + TEXTS[3:], "cpu", 1, False)[0]
            assert (texts - stages.texts.encode(TEXTS[:1] + TEXTS[3:])).abs().max() < 1e-5
        scheduler = made["pipeline"].scheduler if pipeline else made["scheduler"]
        scheduler.set_timesteps(50)
        state = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        red = None if stages.texts is None else stages.texts.encode(["a red square"] * 16)
        state = state * scheduler.init_noise_sigma if name.endswith("edm") else state
        for k in scheduler.timesteps:
            z = scheduler.scale_model_input(state, k) if name.endswith("edm") else state
            F = denoiser.network(z, k.float().expand(16), red)
            if red is not None:
                empty = denoiser.network(z, k.float().expand(16), denoiser.null.expand(16, -1, -1))
                F = empty + 4 * (F - empty)
            state = scheduler.step(F, k, state).prev_sample
        expected = (stages.codec.decode(state).clamp(-1, 1) + 1) * 127.5
    shown = np.stack([np.asarray(image) for image in made["images"]]) if pipeline else made["pictures"]
    assert np.abs(shown.astype(float) - expected.permute(0, 2, 3, 1).numpy()).max() < 0.51, "pixels are rounded"

    (Path("outputs") / folder.name / "parts" / "codec").mkdir(parents=True)  # of a run that happens to have that name
    back = find(folder)  # and is a ckpt= of ours
    with torch.no_grad():
        again, beside = load_denoiser(back, "ema"), stages_of(back)
        assert (again(x, torch.tensor(0.4), told) - denoiser(x, torch.tensor(0.4), told)).abs().max() < 1e-4
        assert (beside.codec.decode(x) - stages.codec.decode(x)).abs().max() < 1e-4
        if beside.texts is not None and stages.texts is not None:
            assert (beside.texts.encode(TEXTS[:2]) - stages.texts.encode(TEXTS[:2])).abs().max() < 1e-5


def test_what_no_pipeline_does_is_said(place: Place, tmp_path: Path) -> None:  # noqa: F811
    """In one line with the reason."""
    latents = AutoencoderVQ(3, 16, widths=(8, 16), groups=4)
    words = PEERS["sd"][0]
    for run, said in (
        (place.outputs / "run", "to=diffusers: this UNet reads texts, .* model=unet2d_condition is one of theirs"),
        (peer_run(place, "masked", words[:-1]), r"padding says nothing, .*train with texts\.masked=false"),
        (peer_run(place, "sd_flow", (*CONDITION, *words[len(CONDITION) + 3 :])), "asks no scheduler of prediction=flow"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            asked(run, "to=diffusers", f"out={tmp_path / 'it'}")
        assert "\n" not in str(caught.value) and not (tmp_path / "it").exists()
    with pytest.raises(ConfigError, match="the latents of AutoencoderVQ have a mean and a std in each channel"):
        vae_of(Latent(latents))


def test_an_autoencoder_without_quant_conv_carries_its_scale() -> None:
    codec = Latent(AutoencoderKL(1, 8, widths=(8, 8), groups=4, quant_conv=False)).eval()
    codec.mean.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    codec.std.copy_(torch.tensor([0.5, 2.0, 1.0, 4.0]))
    vae, x, pictures = vae_of(codec), torch.randn(2, 4, 4, 4), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert (vae.decode(x).sample - codec.decode(x)).abs().max() < 1e-5
        assert (vae.encode(pictures).latent_dist.mean - codec.encode(pictures)).abs().max() < 1e-5
