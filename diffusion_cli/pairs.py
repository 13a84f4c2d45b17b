"""Values of a config that are right alone and impossible together: said before torch is imported."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from diffusion_cli.distributed import misfits
from diffusion_cli.pace import Pace
from diffusion_cli.signatures import shown, signature, target_of

STAGES = ("codec", "texts", "perceptual")  # the groups of frozen parts
# a frozen part -> the packages that it needs
_STAGE_NEEDS = {"Latents": ("diffusers",), "Clip": ("transformers", "tokenizers"), "TextEncoder": ("transformers",)}
_OF_DIFFUSERS = ("diffusion_cli.models.AutoencoderKL", "diffusion_cli.models.AutoencoderVQ")


def impossible(node: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is wrong with a config of training, whose values are right alone."""
    wrong = []
    trainer, sampler = node["trainer"], node["sampler"]
    if node["model"]["_target_"] in _OF_DIFFUSERS and find_spec("diffusers") is None:
        wrong.append("the networks of autoencoders are those of diffusers: pip install 'diffusion-cli[diffusers]'")
    if "tokenizer" in target_of(node["objective"], "objective", node["trust"]).parameters:
        lacking = [package for package in ("transformers", "tokenizers") if find_spec(package) is None]
        wrong += [
            f"{name} is not installed, and this objective reads texts: pip install 'diffusion-cli[text]'"
            for name in lacking[:1]
        ]
    if trainer["steps"] is None and trainer["images"] is None and trainer["minutes"] is None:
        wrong.append("the run has no end: give trainer.steps, trainer.images or trainer.minutes")
    decay = node["optimizer"].get("decay")
    if trainer["steps"] is None and trainer["images"] is None and decay and _falls_to_the_end(decay):
        name = decay["_target_"].rpartition(".")[2].lower()
        wrong.append(
            f"optimizer/decay={name} needs to know the end of the run: give trainer.steps or trainer.images besides minutes"
        )
    if trainer["batch"] % trainer["accumulate"]:
        wrong.append(
            f"trainer.batch is {trainer['batch']} and trainer.accumulate {trainer['accumulate']}: the batch must be a multiple"
        )
    pace = Pace.of(trainer)
    for images, (step, seen, _), (later, _, _) in zip(pace.doublings, pace.stretches, pace.stretches[1:]):
        if later <= step:
            wrong.append(
                f"trainer.batch_doublings is {shown(trainer['batch_doublings'])}: {images} comes too soon, {seen} pictures "
                "have been seen when the doubling before it takes effect, and at least one step of every batch is made"
            )
            break
    wrong += misfits(node)
    needs_signal = (
        "diffusion_cli.predictions._NeedsSignal" in target_of(node["prediction"], "prediction", node["trust"]).lineage
    )
    if needs_signal and _ends_in_noise(node["schedule"]):
        name = node["prediction"]["_target_"].rpartition(".")[2].lower()
        wrong.append(
            f"prediction={name} is impossible on a schedule that ends in pure noise (alpha = 0 at t = 1, where nothing of the "
            "picture is left to divide by): choose prediction=v, x0, flow or edm, or another schedule"
        )
    wrong += _stages(node)
    wrong += _untaught(node)
    learned = (node["objective"].get("term") or {}).get("_target_") == "diffusion_cli.losses.Hybrid"
    if learned and "variance_channels" not in target_of(node["model"], "model", node["trust"]).parameters:
        wrong.append(
            f"objective/term=hybrid needs a network that says variances, and {node['model']['_target_'].rpartition('.')[2]} "
            "says none (its constructor has no variance_channels): choose model=unet, unet_attn, dit or another that does"
        )
    grid = sampler["grid"]
    if "table" in grid and sampler["steps"] > grid["table"]:
        wrong.append(f"sampler.steps is {sampler['steps']}, but sampler.grid.table has only {grid['table']} indices")
    return wrong


def _stages(node: Mapping[str, Any]) -> list[str]:
    """What is wrong with the frozen parts beside the rest."""
    wrong, takes = [], target_of(node["objective"], "objective", node["trust"]).parameters
    for group in STAGES:
        if node.get(group) is None:
            continue
        name = node[group]["_target_"].rpartition(".")[2]
        if group not in takes and group == "perceptual":
            wrong.append(f"perceptual={name.lower()}: it judges what an autoencoder gives back; choose objective=autoencoding")
        elif group not in takes:
            wrong.append(f"{group}={name.lower()}: this objective works with pictures as they are; choose objective=denoising")
        lacking = [package for package in _STAGE_NEEDS.get(name, ()) if find_spec(package) is None]
        wrong += [f"{group}={name.lower()} needs {lacking[0]}: pip install 'diffusion-cli[latent]'"] if lacking else []
    if node.get("texts") is not None and node["dataset"]["labels"]:
        wrong.append("dataset.labels=true and texts: the network is told labels or texts, not both: dataset.labels=false")
    return wrong


def _untaught(node: Mapping[str, Any]) -> list[str]:
    """A few-step method that must have a teacher, and has none."""
    method = node["objective"].get("method") or {}
    if (
        method.get("teacher", "") is not None
        or not target_of(method, "objective.method", node["trust"]).parameters["teacher"].required
    ):
        return []
    name = method["_target_"].rpartition(".")[2].lower()
    return [f"objective={name} learns from a trained model: say which, init=outputs/<name> or init=hf://OWNER/NAME"]


def _falls_to_the_end(decay: Mapping[str, Any]) -> bool:
    """Whether a decay of the learning rate is stretched over the whole run."""
    lineage = signature(decay["_target_"]).lineage
    return any(f"diffusion_cli.optimizers.{name}" in lineage for name in ("Linear", "Cosine", "Late"))


def _ends_in_noise(schedule: Mapping[str, Any]) -> bool:
    """Whether alpha(1) = 0, from the node alone: what `reaches_zero` says of the object."""
    lineage = signature(schedule["_target_"]).lineage
    if "base" in schedule:  # one that stands on another
        return _ends_in_noise(schedule["base"])
    return "diffusion_cli.schedules.Flow" in lineage or bool(schedule.get("zero_terminal_snr", False))
