"""to=diffusers: a folder that diffusers loads with its own classes, network and scheduler, and a pipeline where one fits.

    pixels                   DDPMPipeline, DDIMPipeline, ConsistencyModelPipeline
    latents                  LDMPipeline without labels, DiTPipeline of a DiT
    latents, told texts      StableDiffusionPipeline of a UNet2DCondition

Its pipelines for bare pictures are few. DDIMPipeline and DDPMPipeline tell no label and scale nothing. Another one, called
ConsistencyModelPipeline, is in truth the plain loop: input scaled, label told, step; but with FlowMatchEulerDiscreteScheduler,
which has no scaling to be asked for, it fails. Where none fits, the parts are written, and the card has the loop.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_cli.build import build
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting import diffusers_models, diffusers_schedulers
from diffusion_cli.exporting.diffusers_beside import texts_of, vae_of
from diffusion_cli.exporting.diffusers_schedulers import Peer
from diffusion_cli.exporting.parcel import MEAN_ALONE, Model, Parcel
from diffusion_cli.models import UNet
from diffusion_cli.pretrained.files import FACTS
from diffusion_cli.samplers import Sampler
from diffusion_cli.sampling.telling import classes_of
from diffusion_cli.stages import stages_of
from diffusion_cli.vision import mend_torchvision

NO_LABEL = "none"  # the word for the null label
# parts of a pipeline that it can do without
_LEFT_OUT = {"StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}}
_LIMITS = {
    "DiTPipeline": "DiTPipeline guides away from label 1000 alone, which is no label where there are 1,000 classes: else "
    "`guidance_scale=1`; diffusion-sample guides any."
}


def diffusers(model: Model) -> Parcel:
    """Raises ConfigError for what has no counterpart there."""
    mend_torchvision()
    import diffusers

    sampler = build(model.node["sampler"], Sampler, "sampler", trust=model.settings.trust)
    stages = stages_of(model.found, model.settings.trust)
    pixels = stages.codec.bounded
    varied = sampler.varied and pixels and type(model.denoiser.network) is UNet
    peer = diffusers_schedulers.peer_of(model.denoiser.prediction, sampler.clip and pixels, varied)
    whole, model = model, model if peer.name == "DDPMScheduler" else model.of_mean()
    network = diffusers_models.peer_of(model.denoiser.network, model.node["model"], label_of(model))
    scheduler = getattr(diffusers, peer.name)(**peer.config)
    pipeline = pipeline_for(network, peer, not pixels)
    if pipeline == "StableDiffusionPipeline" and "steps_offset" in scheduler.config:
        scheduler.register_to_config(steps_offset=1)  # without effect on trailing times, and warned of where it is 0
    part = "transformer" if isinstance(network, diffusers.DiTTransformer2DModel) else "unet"
    parts: dict[str, Any] = {part: network, "scheduler": scheduler}
    if not pixels:
        parts["vqvae" if pipeline == "LDMPipeline" else "vae"] = vae_of(stages.codec)
    if stages.texts is not None:
        parts |= texts_of(stages.texts)
    with tempfile.TemporaryDirectory() as place:
        if pipeline is not None:
            getattr(diffusers, pipeline)(**parts, **_LEFT_OUT.get(pipeline, {})).save_pretrained(place)
        else:
            for name, one in parts.items():
                one.save_pretrained(f"{place}/{name}")
        paths = [path for path in sorted(Path(place).rglob("*")) if path.is_file()]
        files = {path.relative_to(place).as_posix(): path.read_bytes() for path in paths}
    files[FACTS] = _facts(model)
    use = _of_pipeline(model, network, peer, pipeline) if pipeline else _of_parts(model, network, peer, part)
    limits = tuple(filter(None, (peer.note, _LIMITS.get(pipeline or ""), None if model is whole else MEAN_ALONE)))
    tag = (f"diffusers:{pipeline}",) if pipeline else ()
    return Parcel(files, use, "diffusers", ("safetensors", *tag), limits)


def _facts(model: Model) -> bytes:
    """What no file of diffusers says, and diffusion-sample ckpt=FOLDER reads: names of classes, and whether none was taught."""
    open_labels = model.facts["taught"] and label_of(model) is None
    facts = {**model.facts, **({} if open_labels else {"classes": [], "taught": []})}
    told = {"facts": facts, "label_dropout": model.node["objective"].get("label_dropout", 0.0)}
    return (json.dumps(told, indent=1) + "\n").encode()


def label_of(model: Model) -> int | None:
    """The label to be told for good, by number; None where labels stay open. Raises ConfigError."""
    said, facts = model.settings.label, model.facts
    if said is None:
        return None
    if facts["taught"] and str(said) == NO_LABEL and NO_LABEL not in facts["classes"]:
        if not model.node["objective"].get("label_dropout"):
            raise ConfigError("label=none: this network was always told a class (objective.label_dropout=0); name one")
        return model.denoiser.network.num_classes
    found = classes_of(said, facts) or []
    if len(found) != 1:
        raise ConfigError(f"label={said}: a single class is told for good, or none")
    return found[0]


def pipeline_for(network: nn.Module, peer: Peer, latents: bool) -> str | None:
    """The name of the pipeline whose loop asks this network as it was trained, with this scheduler. Raises ConfigError where
    a network that reads texts has none."""
    config: Any = network.config
    if "cross_attention_dim" in config:
        if not latents or peer.name == "FlowMatchEulerDiscreteScheduler":
            what = "asks no scheduler of prediction=flow" if latents else "makes latents, and this network pixels"
            raise ConfigError(f"to=diffusers: a StableDiffusionPipeline {what}; to=folder, onnx and torch_export take it")
        return "StableDiffusionPipeline"
    if "num_class_embeds" not in config:  # a transformer, of which there is a pipeline of latents
        return "DiTPipeline" if latents and peer.name == "DDIMScheduler" else None
    if latents:
        fits = config.num_class_embeds is None and peer.name != "FlowMatchEulerDiscreteScheduler"
        return "LDMPipeline" if fits else None
    if peer.scales or (config.num_class_embeds is not None and peer.name == "DDIMScheduler"):
        return "ConsistencyModelPipeline"
    if config.num_class_embeds is not None:
        return None
    return "DDIMPipeline" if peer.name == "DDIMScheduler" else "DDPMPipeline"


def _of_pipeline(model: Model, network: Any, peer: Peer, pipeline: str) -> str:
    labels = f", class_labels=[{_label(model)}] * 16" if network.config.get("num_class_embeds") is not None else ""
    clipped = ", use_clipped_model_output=True" if pipeline == "DDIMPipeline" and peer.config["clip_sample"] else ""
    asked = f"batch_size=16{labels}"
    if pipeline == "DiTPipeline":
        labels = asked = f"class_labels=[{_label(model)}] * 16, guidance_scale=1"
    if pipeline == "StableDiffusionPipeline":
        asked = '["a red square"] * 16, guidance_scale=4.0'
    told = _labels_told(model) if labels and model.facts["taught"] else ""
    odd = " This pipeline is the plain loop over a scheduler, labels told; nothing here is a consistency model."
    part = "transformer" if pipeline == "DiTPipeline" else "unet"
    return f"""A pipeline of diffusers, `{pipeline}`: `{part}/` is a {type(network).__name__}, `scheduler/` a {peer.name}.\
{odd if pipeline == "ConsistencyModelPipeline" else ""}{told}

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".")
generator = torch.Generator().manual_seed(0)
images = pipeline({asked}, num_inference_steps=50, generator=generator{clipped}).images
images[0].save("picture.png")
```"""


def _of_parts(model: Model, network: Any, peer: Peer, part: str) -> str:
    name, transformer = type(network).__name__, part == "transformer"
    tells = transformer or network.config.num_class_embeds is not None
    labels = f"\nlabels = torch.full((16,), {_label(model)})" if tells else ""
    time = "timestep=t.expand(16)" if transformer else "t"
    told = ", class_labels=labels" if tells else ""
    asked = f"network({'scheduler.scale_model_input(x, t)' if peer.scales else 'x'}, {time}{told})"
    start = "scheduler.init_noise_sigma * " if peer.scales else ""
    shape = ", ".join(map(str, (16, *model.diffused)))
    latents = "codec" in model.facts
    decoder = '\nvae = AutoencoderKL.from_pretrained("vae")' if latents else ""
    decoded = "\n    x = vae.decode(x).sample" if latents else ""
    if latents:
        why = "none of its pipelines of latents asks this network with this scheduler"
    elif transformer:
        why = "its DiTPipeline decodes latents of an autoencoder"
    else:
        why = "none of its pipelines tells a label on this path (exported with label=none or a class, one fits)"
    beside = "`vae/`: an AutoencoderKL, " if latents else ""
    return f"""Parts for diffusers, `{part}/`: a {name}, {beside}and `scheduler/`: a {peer.name}. They make no pipeline, for \
{why}; this is the loop.{_labels_told(model) if model.facts["taught"] else ""}

```python
import torch
from diffusers import {", ".join(sorted([peer.name, name, *(["AutoencoderKL"] if latents else [])]))}
from PIL import Image

network = {name}.from_pretrained("{part}")
scheduler = {peer.name}.from_pretrained("scheduler"){decoder}
scheduler.set_timesteps(50)
x = {start}torch.randn({shape}, generator=torch.Generator().manual_seed(0)){labels}
with torch.no_grad():
    for t in scheduler.timesteps:
        F = {asked}.sample
        x = scheduler.step(F, t, x).prev_sample{decoded}
pictures = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
Image.fromarray(pictures[0{", :, :, 0" if model.shape[0] == 1 else ""}]).save("picture.png")
```"""


def _label(model: Model) -> int:
    told = model.facts["taught"]
    return told[-1] if told else 0


def _labels_told(model: Model) -> str:
    names = model.facts["classes"]
    few = ", ".join(f"{k} {names[k]}" if str(k) != names[k] else names[k] for k in model.facts["taught"][:20])
    return f" Labels: {few}; {len(names)} is no label."
