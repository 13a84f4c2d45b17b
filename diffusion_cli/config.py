"""From a composed config to checked settings: everything that can be wrong is said before torch is imported or data touched."""

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_cli import settings
from diffusion_cli.distributed import misfits
from diffusion_cli.errors import ConfigError
from diffusion_cli.evaluation import words
from diffusion_cli.options import CONFIGS as CONFIGS
from diffusion_cli.signatures import check, check_values, shown, signature, target_of

# what an objective's constructor may ask of the program, by the names of arguments: assembly.py makes them
PARTS = (
    "denoiser", "classifier", "autoencoder", "clip", "tokenizer", "schedule", "loss", "times", "sampler", "guidance", "names",
    "taught", "previews", "codec", "texts", "perceptual", "teacher",
)  # fmt: skip
# the part that an objective trains -> what the group `model` must be for it, where that is no Network, and what it is given
MODELS = {
    "classifier": ("diffusion_cli.models.Classifier", ("channels", "image_size", "num_classes")),
    "autoencoder": ("diffusion_cli.models.Autoencoder", ("channels", "image_size")),
    "clip": ("diffusion_cli.models.Clip", ("channels", "image_size", "vocabulary")),
}
_OF_DIFFUSERS = ("diffusion_cli.models.AutoencoderKL", "diffusion_cli.models.AutoencoderVQ")

# a frozen part -> the packages that it needs
_STAGE_NEEDS = {"Latents": ("diffusers",), "Clip": ("transformers", "tokenizers"), "TextEncoder": ("transformers",)}

FACTS = (
    "channels", "image_size", "num_classes", "hint_channels", "text_width", "augment_width", "two_times", "variance_channels",
    "vocabulary",
)  # fmt: skip
# group -> (what it must build, which of its arguments the program itself supplies)
TRAIN_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dataset": ("diffusion_cli.data.Dataset", ()),
    "schedule": ("diffusion_cli.schedules.Schedule", ()),
    "prediction": ("diffusion_cli.predictions.Prediction", ("schedule",)),
    "loss": ("diffusion_cli.losses.Loss", ()),
    "model": ("diffusion_cli.models.Network", FACTS),
    "optimizer": ("diffusion_cli.optimizers.Optimizer", ()),
    "ema": ("diffusion_cli.ema.EMA", ()),
    "sampler": ("diffusion_cli.samplers.Sampler", ()),
    "guidance": ("diffusion_cli.guidance.Guidance", ()),
    "objective": ("diffusion_cli.objectives.Objective", PARTS),
    "distributed": ("diffusion_cli.group.Distributed", ()),
}
FEATURES = "diffusion_cli.features.Features"
STAGES = dict.fromkeys(("codec", "texts", "perceptual"), "diffusion_cli.stages.Stage")
NULLABLE = {"features": FEATURES, "adapter": "diffusion_cli.adapters.LoRA", **STAGES}  # groups of training that may be null

SAMPLE_GROUPS = {
    "sampler": "diffusion_cli.samplers.Sampler",
    "guidance": "diffusion_cli.guidance.Guidance",
    "edit": "diffusion_cli.editing.Edit",
}
EVALUATE_GROUPS = {
    "features": FEATURES,
    "sampler": "diffusion_cli.samplers.Sampler",
    "guidance": "diffusion_cli.guidance.Guidance",
}
GIVEN = {"edit": ("original", "codec")}  # which arguments the program itself supplies


def plain(config: DictConfig) -> dict[str, Any]:
    """The config with its references resolved, as dictionaries, lists, words and numbers."""
    try:
        found = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        place = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(place + str(error).splitlines()[0]) from None
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def check_train(node: dict[str, Any]) -> settings.Plan:
    """Settings of a training run from the composed config. Raises ConfigError with a line for everything that is wrong."""
    node = dict(node)
    for slot in ("experiment", "sweep"):  # their files were merged into the rest
        node.pop(slot, None)
    if isinstance(node.get("name"), int | float):
        node["name"] = str(node["name"])
    inner = {*TRAIN_GROUPS, *NULLABLE, "trainer"}
    trust = node.get("trust") if isinstance(node.get("trust"), list) else []
    wrong = _root(node, "Train", inner)
    wrong += _values(node.get("trainer"), "Trainer", "trainer")
    for group, (base, given) in TRAIN_GROUPS.items():
        if group == "model":
            base, given = _model_of(node.get("objective"), trust) or (base, given)
        found = check(node.get(group), base, group, given, trust)
        if group == "model" and found and ": not a " in found[0]:
            found[0] += "; model=classifier goes with objective=classifying, autoencoder_kl and autoencoder_vq with "
            found[0] += (
                "objective=autoencoding, model=clip with objective=contrasting, the other models with objective=denoising"
            )
        wrong += found
    for group, base in NULLABLE.items():
        if node.get(group) is not None:
            wrong += check(node[group], base, group, trust=trust)
    if not wrong and (node["init"] is None or node["init_digest"] is not None):  # else the model brings some of them yet
        wrong = _pairs(node)
    if not wrong:
        wrong = _adapted(node) + _watched(node)
    if wrong:
        raise ConfigError("\n".join(wrong))
    root = settings.Train(**_tuples({key: value for key, value in node.items() if key not in inner}))
    return settings.Plan(root, settings.Trainer(**_tuples(node["trainer"])), node)


def planned(node: dict[str, Any], words: Sequence[str]) -> settings.Plan:
    """The same with what init= brings, which the words of the command line may change. Raises UserError."""
    plan = check_train(node)
    if plan.root.init is None:
        return plan
    from diffusion_cli.initial import adopted  # torch, for a trained model is read

    return check_train(adopted(plan.node, words))


def check_sample(node: dict[str, Any]) -> settings.Request:
    """What is asked of a checkpoint, from the composed config. Raises ConfigError with a line for everything that is wrong."""
    node = _with_ckpt(node)
    for word in ("prompt", "negative"):
        node[word] = str(node[word]) if isinstance(node.get(word), int | float) else node.get(word)
    nodes = {group: node.pop(group, None) for group in SAMPLE_GROUPS}
    wrong = _root(node, "Sample", set())
    trust = node.get("trust") if isinstance(node.get("trust"), list) else []
    wrong += _asked(nodes, SAMPLE_GROUPS, trust)
    if not wrong:
        wrong = _beginning(node, nodes["edit"])
    if not wrong and node["prompt"] is not None and node["prompts"] is not None:
        wrong.append("prompt and prompts: say what is wanted there or in the file, not both")
    if not wrong and node["data"] is not None and not node["nearest"]:
        wrong.append(f"data={node['data']}: training pictures are looked at with nearest= alone; add nearest=5")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return settings.Request(settings.Sample(**_tuples(node)), dict(nodes["sampler"] or {}), nodes["guidance"], nodes["edit"])


def check_evaluate(node: dict[str, Any]) -> settings.Measurement:
    """What is measured of a checkpoint, from the composed config. Raises ConfigError with a line for everything wrong."""
    node = _with_ckpt(node)
    nodes = {group: node.pop(group, None) for group in EVALUATE_GROUPS}
    wrong = _root(node, "Evaluate", set())
    trust = node.get("trust") if isinstance(node.get("trust"), list) else []
    wrong += _asked(nodes, EVALUATE_GROUPS, trust)
    if not wrong:
        wrong = _metrics("metrics", node["metrics"], nodes["features"])
    if not wrong and not node["metrics"]:
        wrong.append(f"metrics is empty: name some of {', '.join((*words.OF_PICTURES, *words.OF_SAMPLES))}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return settings.Measurement(
        settings.Evaluate(**_tuples(node)), nodes["features"], dict(nodes["sampler"] or {}), nodes["guidance"]
    )


def _asked(nodes: Mapping[str, Any], groups: Mapping[str, str], trust: list[str]) -> list[str]:
    """What is wrong with the groups of a command that asks a checkpoint."""
    wrong = []
    sampler = nodes["sampler"] or {}
    if isinstance(sampler, Mapping) and "_target_" not in sampler:  # the checkpoint's own, changed
        steps = signature("diffusion_cli.samplers.Sampler").parameters["steps"].kind
        if sampler.get("steps") is not None and not steps.holds(sampler["steps"]):
            wrong.append(f"sampler.steps is {shown(sampler['steps'])}: it must be {steps}")
    for group, base in groups.items():
        if isinstance(nodes[group], Mapping) and "_target_" in nodes[group]:
            wrong += check(nodes[group], base, group, GIVEN.get(group, ()), trust)
    return wrong


def _adapted(node: Mapping[str, Any]) -> list[str]:
    """What an adapter lacks."""
    if node.get("adapter") is None:
        return []
    wrong = (
        [] if node["init"] else ["adapter=lora adds to a trained model: say which, init=outputs/<name> or init=hf://OWNER/NAME"]
    )
    if node["objective"].get("critic") is not None:
        wrong.append("adapter=lora and objective/critic: a critic needs a decoder that learns as a whole; leave one out")
    return wrong + ["adapter=lora needs more packages: pip install 'diffusion-cli[lora]'"] * (find_spec("peft") is None)


def _watched(node: Mapping[str, Any]) -> list[str]:
    """What is wrong with the figures of samples, and with the best figure, of a training run."""
    trainer, features = node["trainer"], node.get("features")
    metrics, best = trainer["metrics"], trainer["best"]
    wrong = _metrics("trainer.metrics", metrics, features)
    if metrics and not {"sampler", "autoencoder"} & set(target_of(node["objective"], "objective", node["trust"]).parameters):
        wrong.append(f"trainer.metrics={','.join(metrics)}: figures of samples, and this objective makes none")
    if best is None and trainer["patience"] is not None:
        wrong.append(f"trainer.patience={trainer['patience']}: without a better what? trainer.best=evaluate/x0_mse says it")
    if best is not None and not re.fullmatch(r"evaluate(_on_train)?/\w+", best):
        wrong.append(f"trainer.best is {best}: it must be the name of a figure, as evaluate/x0_mse")
    return wrong


def _metrics(key: str, metrics: Sequence[str], features: Mapping[str, Any] | None) -> list[str]:
    """What the metrics of samples need and do not have."""
    name = None if features is None else str(features["_target_"]).rpartition(".")[2].lower()
    wrong = words.unmet(key, metrics, name)
    wanted = [metric for metric in metrics if metric in words.OF_SAMPLES]
    packages = ["torch_fidelity"] if any(words.OF_SAMPLES[metric].library for metric in wanted) or name == "inception" else []
    packages += ["transformers"] if name in ("dinov2", "clip") else []
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    if lacking:
        wrong.append(f"{lacking[0].replace('_', '-')} is not installed: pip install 'diffusion-cli[eval]'")
    return wrong


# what a form of export needs beyond the program itself: package -> the extra that brings it
_EXTRAS = {"diffusers": {"diffusers": "diffusers"}, "onnx": {"onnx": "onnx", "onnxscript": "onnx"}}
_WALKED = ("onnx", "torch_export")  # forms that carry a walk beside the network


def check_export(node: dict[str, Any]) -> settings.Export:
    """Settings of an export from the composed config. Raises ConfigError with a line for everything that is wrong."""
    node = _with_ckpt(node)
    for word in ("repo", "licence"):
        node[word] = str(node[word]) if isinstance(node.get(word), int | float) else node.get(word)
    wrong = _root(node, "Export", set())
    if wrong:
        raise ConfigError("\n".join(wrong))
    asked = settings.Export(**_tuples(node))
    if asked.to == "hub" and asked.repo is None:
        wrong.append("to=hub needs a place there: repo=OWNER/NAME")
    if asked.to != "hub" and asked.repo is not None:
        wrong.append(f"repo={asked.repo} is about the hub: write to=hub repo={asked.repo} form={asked.to}")
    if asked.repo is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", asked.repo):
        wrong.append(f"repo is {asked.repo}: a place on the hub is OWNER/NAME")
    if asked.licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", asked.licence):
        wrong.append(f"licence is {asked.licence}: the hub's short names are meant, such as apache-2.0, mit or cc-by-4.0")
    if asked.label is not None and asked.written != "diffusers":
        wrong.append(f"label={asked.label} is told for good to a network of diffusers alone: to=diffusers")
    if asked.steps is not None and asked.written not in _WALKED:
        wrong.append(f"steps={asked.steps} is about the walk beside a network: to={' or to='.join(_WALKED)}")
    lacking = {extra for name, extra in _EXTRAS.get(asked.written, {}).items() if find_spec(name) is None}
    wrong += [f"to={asked.written} needs more packages: pip install 'diffusion-cli[{extra}]'" for extra in sorted(lacking)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return asked


def check_report(node: dict[str, Any]) -> settings.Report:
    """Settings of a report from the composed config. Raises ConfigError with a line for everything that is wrong."""
    if node.get("runs") in ("???", []):
        raise ConfigError("say which runs: diffusion-report outputs/<name>, a run, a sweep, or several")
    runs = node["runs"] if isinstance(node["runs"], list) else [node["runs"]]
    node = {**node, "runs": [str(run) if isinstance(run, int | float) else run for run in runs]}
    if wrong := _root(node, "Report", set()):
        raise ConfigError("\n".join(wrong))
    return settings.Report(**_tuples(node))


def _with_ckpt(node: dict[str, Any]) -> dict[str, Any]:
    if node.get("ckpt") == "???":
        raise ConfigError("say which checkpoint: ckpt=outputs/<name>, a run or one of its checkpoints/step_... folders")
    return {**node, "ckpt": str(node["ckpt"]) if isinstance(node["ckpt"], int | float) else node["ckpt"]}


def _beginning(node: Mapping[str, Any], edit: object) -> list[str]:
    """Words about where pictures begin that contradict each other."""
    said = [word for word in ("init", "strength", "vary", "between") if node[word] is not None]
    said += [] if edit is None else ["edit"]
    if "between" in said:
        others = [word for word in said if word != "between"]
        return [f"between goes without {' and '.join(others)}"] if others else _ends(node["between"], node["n"])
    if "init" not in said and said:
        return [f"{said[0]} is about a picture that is given: say which, init=picture.png"]
    if "vary" in said and len(said) > 2:
        return [f"vary goes without {' and '.join(word for word in said if word not in ('init', 'vary'))}"]
    return []


def _ends(ends: Sequence[object], n: int) -> list[str]:
    """What is wrong with the ends of `between`, of n pictures."""
    kinds = {isinstance(end, str) for end in ends}
    if len(ends) not in (2, 4) or len(kinds) > 1:
        return ["between takes two ends or four corners, either numbers of pictures or files: [3,17] or [a.png,b.png]"]
    if n < len(ends):
        return [f"n is {n}: between needs its ends at least, n={len(ends)}"]
    side = math.isqrt(n)
    if len(ends) == 4 and side**2 != n:
        return [f"n is {n}: a map between four corners is a square, n={side**2} or n={(side + 1) ** 2}"]
    return []


def _model_of(objective: object, trust: list[str]) -> tuple[str, tuple[str, ...]] | None:
    """What the group `model` must be for this objective and what it is given, where that is no Network."""
    try:
        parts = target_of(objective, "objective", trust).parameters
    except ConfigError:
        return None  # its own line says why
    return next((model for part, model in MODELS.items() if part in parts), None)


def _root(node: Mapping[str, Any], schema: str, inner: set[str]) -> list[str]:
    wrong = check_values({k: v for k, v in node.items() if k not in inner}, signature(f"{settings.__name__}.{schema}"), "")
    device = node.get("device")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        wrong.append(f"device is {device}: it must be auto, cpu, cuda, cuda:1 ... or mps")
    name = node.get("name")
    if isinstance(name, str) and not re.fullmatch(r"(/(?!\.)[\w.+-]+)+", "/" + name):
        wrong.append(f"name is {name}: it becomes a folder, so letters, digits and . _ - + / only, no . or / first")
    return wrong


def _values(node: object, schema: str, path: str) -> list[str]:
    if not isinstance(node, Mapping):
        return [f"{path} is {shown(node)}: it must be a node of settings"]
    return check_values(node, signature(f"{settings.__name__}.{schema}"), path)


def _pairs(node: Mapping[str, Any]) -> list[str]:
    """Values that are right alone and impossible together."""
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


def _tuples(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in node.items()}
