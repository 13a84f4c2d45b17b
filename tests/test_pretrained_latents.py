"""Pipelines of latents and texts as ckpt=: networks, autoencoders, tokens and whole walks are those of diffusers.

Networks of random weights, away from zero. Bound: 1e-5 of the largest value, of parts, walks and pictures.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as nnf
from captioned import written
from hub_of_models import COMMIT, Models, reach, served
from PIL import Image
from text_encoders import LENGTH, WIDTH, encoders
from tiny import compose, train
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.build import build
from diffusion_cli.errors import UserError
from diffusion_cli.finding import find, load_codec, load_denoiser
from diffusion_cli.guidance import CFG, Unguided
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.samplers import Ancestral, Sampler, last
from diffusion_cli.sampling import sample
from diffusion_cli.stages import stages_of
from diffusion_cli.vision import mend_torchvision
from diffusion_cli.walking import asking

mend_torchvision()
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SIZE, LATENT = 16, 8  # of pictures and latents
INDEX = "model_index.json"
PROMPTS = ["grinning face of a cat", "the moon"]
DDIM = {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stirred(module: Any) -> Any:
    """Away from the zeros of a fresh network, which hide what lies behind them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def vae(**keys: Any) -> Any:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": SIZE, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return stirred(diffusers.AutoencoderKL(**{**shape, **blocks, **keys}))


def vqvae() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": SIZE, "latent_channels": 3}
    return stirred(diffusers.VQModel(**shape, **blocks, num_vq_embeddings=16, scaling_factor=0.7))


def unconditional() -> Any:
    keys = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": LATENT, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4}
    net = diffusers.UNet2DModel(**sizes, **keys, layers_per_block=1)
    return diffusers.LDMPipeline(vqvae(), stirred(net), diffusers.DDIMScheduler(**DDIM))


def dit() -> Any:
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=LATENT,
        num_embeds_ada_norm=1000, norm_eps=1e-5,
    )  # fmt: skip
    shared = net.transformer_blocks[0].norm1.emb
    stirred(net)
    for block in net.transformer_blocks:  # as the published weights have it
        block.norm1.emb.load_state_dict(shared.state_dict())
    return diffusers.DiTPipeline(net, vae(scaling_factor=0.4), diffusers.DDIMScheduler(**DDIM))


def conditioned(**keys: Any) -> Any:
    torch.manual_seed(0)
    shape = {
        "sample_size": LATENT, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": WIDTH, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return stirred(diffusers.UNet2DConditionModel(**{**shape, **keys}))


def stable(scheduler: Any = None, **keys: Any) -> Any:
    encoder, tokenizer = encoders()["clip"]
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder, tokenizer=tokenizer, unet=conditioned(**keys), safety_checker=None,
        scheduler=scheduler or diffusers.DDIMScheduler(**DDIM, steps_offset=1), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def second(scheduler: Any = None) -> Any:
    """As Stable Diffusion 2: linear projections, heads for each level, v."""
    keys = {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True}
    return stable(diffusers.DDIMScheduler(**DDIM, steps_offset=1, prediction_type="v_prediction"), **keys)


def aura() -> Any:
    encoder, tokenizer = encoders()["umt5"]
    torch.manual_seed(0)
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=LATENT, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(tokenizer, encoder, vae(scaling_factor=0.13), stirred(net), scheduler)


MADE: dict[str, Callable[[], Any]] = {"ldm": unconditional, "dit": dit, "sd1": stable, "sd2": second, "aura": aura}
TOLD = [name for name in MADE if name in ("sd1", "sd2", "aura")]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Of diffusers, and the folder where each is saved."""
    folder = tmp_path_factory.mktemp("pipelines")
    found = {}
    for name, make in MADE.items():
        pipeline = make()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / name)
        found[name] = (pipeline, folder / name)
    return found


def close(mine: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() < bound * max(1, theirs.abs().max())
    assert theirs.std() > 0.01


def network_in(pipeline: Any) -> Any:
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def changed(plain: Path, tmp_path: Path, path: str, **keys: Any) -> Path:
    """A copy with other values in one of its JSON files."""
    folder = shutil.copytree(plain, tmp_path / "changed")
    text = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps({**text, **keys}))
    return folder


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_networks_answer_alike(name: str, pipelines: dict[str, tuple[Any, Path]]) -> None:
    pipeline, folder = pipelines[name]
    found, theirs = find(folder), network_in(pipeline)
    ours = load_denoiser(found, "ema").network
    x, time = normal(3, theirs.config.in_channels, LATENT, LATENT), torch.tensor([0.0, 400.25, 999.0])
    with torch.no_grad():
        if name == "dit":
            labels = torch.tensor([0, 7, 1000])
            wanted = theirs(x, timestep=time, class_labels=labels).sample  # eight channels: a variance too
            close(ours(x, time, labels), wanted)
            close(ours(x, time, None)[2], wanted[2])
        elif name in TOLD:
            tokens, scale = normal(3, LENGTH, WIDTH, seed=1), 1000 if name == "aura" else 1
            padded = nnf.pad(tokens, (0, 0, 0, 256 - LENGTH)) if name == "aura" else tokens
            wanted = theirs(x, timestep=time / scale, encoder_hidden_states=padded).sample
            close(ours(x, time, tokens), wanted)
            assert (wanted - theirs(x, timestep=time / scale, encoder_hidden_states=-padded).sample).abs().max() > 1e-3
        else:
            close(ours(x, time), theirs(x, time).sample)


@pytest.mark.parametrize("name", TOLD)
def test_padding_says_nothing(name: str, pipelines: dict[str, tuple[Any, Path]]) -> None:
    """Also to Stable Diffusion's network with another encoder, whose padding is zero."""
    ours = load_denoiser(find(pipelines[name][1]), "ema").network
    x, time, tokens = normal(2, 4, LATENT, LATENT), torch.tensor([10.0, 500.0]), normal(2, 5, WIDTH)
    with torch.no_grad():
        close(ours(x, time, torch.cat([tokens, torch.zeros(2, 3, WIDTH)], dim=1)), ours(x, time, tokens))


@pytest.mark.parametrize("name", MADE)
def test_autoencoders_answer_alike(name: str, pipelines: dict[str, tuple[Any, Path]]) -> None:
    """Also for pictures of another size."""
    pipeline, folder = pipelines[name]
    theirs = getattr(pipeline, "vqvae", None) or pipeline.vae
    found = find(folder)
    codec, facts = stages_of(found).codec, found.config["facts"]
    assert (
        (facts["channels"], facts["image_size"])
        == (3, SIZE)
        == tuple(
            find(folder / "vae" if name != "ldm" else folder / "vqvae").config["facts"][k] for k in ("channels", "image_size")
        )
    )
    scale = theirs.config.scaling_factor
    for size in (SIZE, 2 * SIZE):
        pictures = normal(2, 3, size, size).clamp(-1, 1)
        assert codec.shape(3, size) == (network_in(pipeline).config.in_channels, size // 2, size // 2)
        with torch.no_grad():
            z = theirs.encode(pictures)
            z = z.latents if name == "ldm" else z.latent_dist.mean
            close(codec.encode(pictures), scale * z)
            x = normal(2, *codec.shape(3, size), seed=1)
            close(codec.decode(x), theirs.decode(x / scale).sample)
    assert tuple(facts["codec"]["shape"]) == codec.shape(3, SIZE)
    assert facts["codec"]["digest"] == find(found.config["config"]["codec"]["ckpt"]).digest


@pytest.mark.parametrize(
    "keys",
    [
        {"shift_factor": 0.3, "scaling_factor": 1.5},
        {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 0.5},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False, "layers_per_block": 2},
        {"in_channels": 1, "out_channels": 1, "latent_channels": 2},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_an_autoencoder_alone(keys: dict[str, Any], tmp_path: Path) -> None:
    theirs = vae(**keys)
    theirs.save_pretrained(tmp_path / "it")
    found = find(tmp_path / "it")
    codec = load_codec(found, "ema")
    channels = keys.get("latent_channels", 4)
    mean = torch.tensor(keys.get("latents_mean", [keys.get("shift_factor", 0.0)] * channels)).view(-1, 1, 1)
    std = torch.tensor(keys.get("latents_std", [1.0] * channels)).view(-1, 1, 1) / theirs.config.scaling_factor
    pictures = normal(2, theirs.config.in_channels, SIZE, SIZE)
    with torch.no_grad():
        z = theirs.encode(pictures).latent_dist.mean
        close(codec.encode(pictures), (z - mean) / std)
        close(codec.decode((z - mean) / std), theirs.decode(z).sample)
    assert found.said == str(tmp_path / "it") and len(found.digest) == 64


def test_attention_of_the_oldest_files(tmp_path: Path) -> None:
    """Stable Diffusion 1's autoencoder: layers called query, key, value and proj_attn, or convolutions of one pixel."""
    theirs = vae()
    theirs.save_pretrained(tmp_path / "it")
    path = tmp_path / "it" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    weights = {k: v[:, :, None, None] if ".query.w" in k else v for k, v in weights.items()}
    safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    x = normal(1, 4, LATENT, LATENT)
    with torch.no_grad():
        close(load_codec(find(tmp_path / "it"), "ema").decode(x), theirs.decode(x / theirs.config.scaling_factor).sample)


@pytest.mark.parametrize("name", TOLD)
def test_tokens_are_those_of_the_pipeline(name: str, pipelines: dict[str, tuple[Any, Path]]) -> None:
    pipeline, folder = pipelines[name]
    found = find(folder)
    conditioner = stages_of(found).texts
    keys = {"max_sequence_length": 256} if name == "aura" else {}
    given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True, **keys}
    told = pipeline.encode_prompt(PROMPTS, negative_prompt=["a cat", ""], **given)
    theirs, negative = (told[0], told[2]) if name == "aura" else told
    close(conditioner.encode(PROMPTS), theirs)
    close(conditioner.encode(["a cat", ""]), negative)
    close(found.tensors("average")["denoiser.null"], negative[1])
    facts = found.config["facts"]["texts"]
    assert theirs.shape == (2, facts["length"], facts["width"]) == (2, conditioner.length, conditioner.width)


def walked(found: Trained, x: Tensor, steps: int, told: Tensor | None, away: Tensor | None, scale: float) -> Tensor:
    """The end of our walk of the pipeline's own sampler, by classifier-free guidance away from tokens [L, D] or no label."""
    denoiser = load_denoiser(found, "ema")
    sampler = build({**found.config["config"]["sampler"], "steps": steps}, Sampler, "sampler")
    assert isinstance(sampler, Ancestral) and not sampler.clip
    ask = asking(denoiser, told, Unguided() if told is None else CFG(scale), None, untold=away)()
    with torch.no_grad():
        return last(sampler.walk(ask, denoiser.schedule, x, lambda *_: x)).x


@pytest.mark.parametrize("name", TOLD)
def test_walks_of_texts_are_theirs(name: str, pipelines: dict[str, tuple[Any, Path]]) -> None:
    """The pipeline's own loop, DDIM or Euler by a flow on our grid, from the same noise; then its picture."""
    pipeline, folder = pipelines[name]
    found, x = find(folder), normal(2, 4, LATENT, LATENT)
    given = {"prompt": PROMPTS, "negative_prompt": ["cat"] * 2, "guidance_scale": 5.0, "num_inference_steps": 7}
    given |= {"sigmas": torch.linspace(1, 1 / 7, 7).tolist()} if name == "aura" else {}
    theirs = pipeline(**given, latents=x, output_type="latent").images
    tokens = stages_of(found).texts
    mine = walked(found, x, 7, tokens.encode(PROMPTS), tokens.encode(["cat"])[0], 5.0)
    close(mine, theirs)
    pictures = pipeline(**given, latents=x, output_type="pt").images
    with torch.no_grad():
        close((stages_of(found).codec.decode(mine) / 2 + 0.5).clamp(0, 1), pictures)


def test_walks_of_labels_and_of_nothing_are_theirs(
    pipelines: dict[str, tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = {"dit": normal(2, 4, LATENT, LATENT), "ldm": normal(2, 3, LATENT, LATENT)}
    dit, ldm = (type(pipelines[name][0]).__module__ for name in ("dit", "ldm"))
    monkeypatch.setattr(f"{dit}.randn_tensor", lambda *_, **__: x["dit"])
    monkeypatch.setattr(f"{ldm}.randn_tensor", lambda *_, **__: x["ldm"])
    theirs = {
        "dit": pipelines["dit"][0]([3, 77], guidance_scale=4.0, num_inference_steps=7, output_type="pt").images,
        "ldm": torch.from_numpy(pipelines["ldm"][0](2, num_inference_steps=7, output_type="np").images).movedim(3, 1),
    }
    for name, wanted in theirs.items():
        found = find(pipelines[name][1])
        mine = walked(found, x[name], 7, torch.tensor([3, 77]) if name == "dit" else None, None, 4.0)
        with torch.no_grad():
            close((stages_of(found).codec.decode(mine) / 2 + 0.5).clamp(0, 1), wanted)


def test_classes_have_their_first_names(pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """As the published DiT's model_index.json lists them; ImageNet has two cranes."""
    labels = {k: f"thing {k}, some thing" for k in range(998)} | {998: "crane", 999: "crane, crane bird"}
    folder = changed(pipelines["dit"][1], tmp_path, INDEX, id2label=labels)
    names = find(folder).config["facts"]["classes"]
    assert names[:2] == ["thing 0", "thing 1"] and names[998:] == ["crane", "crane, crane bird"]


# -- commands ----------------------------------------------------------------------------------------------------------


def drawn(ckpt: object, out: Path, *words: str) -> np.ndarray:
    """uint8 [N, H, W, C]: diffusion-sample, here and now."""
    given = (f"ckpt={ckpt}", f"out={out}", "n=4", "device=cpu", "sampler.steps=3", *words)
    folder = sample(config.check_sample(compose(*given, primary="sample")))
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


@pytest.mark.parametrize("name", MADE)
def test_pipelines_draw(name: str, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """By their own sampler and by another one; what is said changes the picture."""
    folder, other = pipelines[name][1], {"ldm": [], "dit": ["label=[3,998]"]}.get(name, ["prompt=[a cat,moon]"])
    first = drawn(folder, tmp_path / "a", *other)
    assert first.shape == (4, SIZE, SIZE, 3) and first.std() > 1
    guided = [] if name == "ldm" else ["guidance=cfg", "guidance.scale=4"]
    words = [*other, "trajectory=true", *guided, *(["negative=cat face"] if name in TOLD else [])]
    second = drawn(folder, tmp_path / "b", "sampler=dpmpp_2m", *words)
    assert (first != second).any() and (tmp_path / "b" / "trajectory.gif").is_file()
    facts = json.loads((tmp_path / "b" / "metadata.json").read_text())
    assert facts["ckpt"] == str(folder) and facts["checkpoint"] == find(folder).digest
    assert facts["prompt"] == (["a cat", "moon"] if name in TOLD else None)


@pytest.mark.parametrize("words", [("edit=inpaint", "edit.box=[0,0,1,0.5]"), ("strength=0.5",), ("vary=0.3",)], ids=" ".join)
def test_pictures_of_ones_own(words: tuple[str, ...], pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    original = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(original).save(tmp_path / "it.png")
    found = drawn(pipelines["sd1"][1], tmp_path / "out", f"init={tmp_path / 'it.png'}", "prompt=a cat", "sampler=ddim", *words)
    assert found.shape == (4, SIZE, SIZE, 3) and (found[0] != found[1]).any()
    assert words[0] != "edit=inpaint" or (found[:, SIZE // 2 :] == original[SIZE // 2 :]).all()


def test_runs_on_the_parts_of_a_pipeline(pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """An autoencoder and a text encoder of others for a network of one's own; the run keeps a copy of the first."""
    folder, set_of = pipelines["sd1"][1], written(tmp_path / "pictures", each=1)
    words = (
        "dataset=folder", f"dataset.path={set_of}", "dataset.size=16", "dataset.limit=DEFAULT",
        "codec=latents", "texts=encoder",
        f"codec.ckpt={folder / 'vae'}", f"texts.name={folder / 'text_encoder'}", f"texts.tokenizer={folder / 'tokenizer'}",
        "texts.masked=false", "model=unet_text", "model.head_width=4",
        "model.multipliers=[1,2]", "model.attention_levels=[1]",
    )  # fmt: skip
    run = train(tmp_path, *words)
    theirs, ours = find(folder).config["facts"], find(run).config["facts"]
    assert ours["codec"] == theirs["codec"] and ours["texts"] == theirs["texts"]
    assert drawn(run, tmp_path / "out", "prompt=a red square").shape == (4, SIZE, SIZE, 3)
    x, kept = normal(1, 4, LATENT, LATENT), stages_of(find(run)).codec
    assert torch.equal(kept.decode(x), load_codec(find(folder / "vae"), "ema").decode(x))


# -- what is refused, in one line --------------------------------------------------------------------------------------


def refused(folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        find(folder).tensors("average")
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


VAE, UNET, TEXT = "vae/config.json", "unet/config.json", "text_encoder/config.json"


@pytest.mark.parametrize(
    ("path", "keys", "says"),
    [
        (INDEX, {"_class_name": "StableDiffusionXLPipeline"}, "which is not read here: it has two text"),
        (INDEX, {"_class_name": "StableDiffusion3Pipeline"}, "not read here: it has three text encoders"),
        (INDEX, {"_class_name": "LDMTextToImagePipeline"}, "LDMBert, is neither of CLIP nor of T5"),
        (INDEX, {"_class_name": "StableDiffusionPipelin"}, "did you mean StableDiffusionPipeline"),
        (INDEX, {"_class_name": "DDPMPipeline"}, "is a DDPMPipeline with a vae"),
        (INDEX, {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, "vqvae/config.json is missing"),
        (INDEX, {"text_encoder": [None, None]}, "without its text_encoder: model_index.json names none"),
        (INDEX, {"vae": ["my_code", "MyVae"]}, "brings code of its own for vae, which is never run"),
        (VAE, {"_class_name": "AutoencoderTiny"}, "its autoencoder is a AutoencoderTiny, and AutoencoderKL and VQModel"),
        (VAE, {"act_fn": "relu"}, "its autoencoder has act_fn relu, and silu is read here"),
        (VAE, {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "its autoencoder has down_block_types"),
        (VAE, {"scaling_factor": 0}, "no scale that fits them"),
        (VAE, {"scaling_factor": -1}, "no scale that fits them"),
        (VAE, {"latents_mean": [0.0]}, "latents have 4 channels, and its config.json has no scale"),
        (VAE, {"latent_channels": 8}, "its network knows 4 channels, and its autoencoder's latents have 8"),
        (UNET, {"in_channels": 9}, "its network gives 4 channels for 9"),
        (UNET, {"addition_embed_type": "text_time"}, "its network has addition_embed_type text_time, which is not read"),
        (UNET, {"class_embed_type": "timestep"}, "its network has class_embed_type timestep, which is not read here"),
        (UNET, {"cross_attention_dim": 32}, "its network reads tokens of width 32, and its texts have 16"),
        (UNET, {"cross_attention_dim": [16, 16]}, r"cross_attention_dim \[16, 16\], and tokens of one stated width"),
        (UNET, {"_class_name": "UNet2DModel", "class_embed_type": None}, "its network reads no texts"),
        (TEXT, {"model_type": "gpt2"}, "its text encoder is a gpt2, and clip, "),
        (TEXT, {"hidden_size": None}, "does not say how wide"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_said(
    path: str, keys: dict[str, Any], says: str, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    assert re.search(says, refused(changed(pipelines["sd1"][1], tmp_path, path, **keys)))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin is a pickle"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin is a pickle"),
        ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin is a pickle"),
    ],
)
def test_weights_that_are_pickles_alone(part: str, says: str, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    folder = shutil.copytree(pipelines["sd1"][1], tmp_path / "it")
    (folder / part).rename(folder / says.partition(" ")[0])
    assert says in refused(folder)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("vae/config.json", "vae/config.json is missing"),
        ("text_encoder/config.json", "text_encoder/config.json is missing"),
        ("text_encoder/model.safetensors", "text_encoder has no weights: model.safetensors is missing"),
        ("tokenizer/tokenizer_config.json", "tokenizer_config.json is missing"),
        ("tokenizer/tokenizer.json", "cannot be used"),
    ],
)
def test_parts_that_are_missing(part: str, says: str, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    folder = shutil.copytree(pipelines["sd1"][1], tmp_path / "it")
    (folder / part).unlink()
    assert says in refused(folder)


@pytest.mark.parametrize(("package", "extra"), [("transformers", "latent"), ("diffusers", "diffusers")])
def test_what_is_not_installed_is_said(
    package: str, extra: str, pipelines: dict[str, tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = find(pipelines["sd1"][1])
    with pytest.raises(UserError, match=re.escape(f"pip install 'diffusion-cli[{extra}]'")) as caught:
        load_denoiser(found, "ema")
    assert len(str(caught.value).splitlines()) == 1


def test_the_digest_is_of_every_part(pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    plain = pipelines["sd1"][1]
    folder = shutil.copytree(plain, tmp_path / "it")
    digests = {find(plain).digest, *(find(folder).digest for _ in range(2))}
    assert len(digests) == 1
    for path in ("vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json", "unet/config.json"):
        (folder / path).write_text((folder / path).read_text() + "\n")
        digests.add(find(folder).digest)
    assert len(digests) == 5


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(
    pipelines: dict[str, tuple[Any, Path]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Models]:
    """Stable Diffusion with what is not read beside it, one whose text encoder is a pickle, a bare autoencoder, a gated one."""
    plain = pipelines["sd1"][1]
    folders = {name: shutil.copytree(plain, tmp_path / name) for name in ("sd", "pickled")}
    folders["vae"] = shutil.copytree(plain / "vae", tmp_path / "vae")
    for name in ("safety_checker/model.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin"):
        (folders["sd"] / name).parent.mkdir(exist_ok=True)
        (folders["sd"] / name).write_bytes(b"not to be fetched")
    (folders["pickled"] / "text_encoder" / "model.safetensors").rename(folders["pickled"] / "text_encoder/pytorch_model.bin")
    with served(Models({f"me/{name}": folder for name, folder in folders.items()}, ("me/gated",))) as models:
        reach(models, monkeypatch)
        yield models


def test_the_hub_gives_every_part_and_nothing_else(hub: Models, pipelines: dict[str, tuple[Any, Path]]) -> None:
    plain = pipelines["sd1"][1]
    found = find("hf://me/sd")
    assert found.digest == find(plain).digest and found.said == f"hf://me/sd@{COMMIT}"
    wanted = {p.relative_to(plain).as_posix() for p in plain.rglob("*") if p.is_file()} - {"tokenizer/chat_template.jinja"}
    assert set(hub.fetched) == wanted and not hub.unknown
    assert torch.equal(found.tensors("average")["denoiser.null"], find(plain).tensors("average")["denoiser.null"])
    assert Path(found.config["config"]["codec"]["ckpt"]) == found.folder / "vae"


@pytest.mark.parametrize(("place", "said"), [("hf://me/sd/vae", "hf://me/sd/vae@"), ("hf://me/vae", "hf://me/vae@")])
def test_an_autoencoder_on_the_hub(
    place: str, said: str, hub: Models, pipelines: dict[str, tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    here = find(pipelines["sd1"][1] / "vae")
    found = find(place)
    assert (found.digest, found.said) == (here.digest, said + COMMIT)
    assert {name.rpartition("/")[2] for name in hub.fetched} == {"config.json", "diffusion_pytorch_model.safetensors"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find(place).digest == here.digest


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("hf://me/pickled", "hf://me/pickled/text_encoder/pytorch_model.bin is a pickle"),
        ("hf://me/gated", "is gated: accept its terms on"),
        ("hf://me/sd/nothing", "is neither a pipeline of diffusers nor an autoencoder"),
    ],
)
def test_what_the_hub_refuses_is_said(place: str, says: str, hub: Models) -> None:
    assert says in refused(place)
    assert not [name for name in hub.fetched if "model.safetensors" in name], "weights come after the refusals"
