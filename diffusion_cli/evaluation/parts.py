"""The kinds of figures: what the network makes of real pictures, how far its samples are from real ones, and how far the
reconstructions of an autoencoder are from the pictures themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.build import build
from diffusion_cli.data import Dataset, Pictures
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import Compute
from diffusion_cli.errors import ConfigError
from diffusion_cli.evaluation import figures
from diffusion_cli.evaluation.figures import Figure
from diffusion_cli.evaluation.held_out import NAMES, rows_of_pictures
from diffusion_cli.evaluation.reconstruction import ERRORS
from diffusion_cli.evaluation.reference import reference_of
from diffusion_cli.evaluation.rows import Make
from diffusion_cli.evaluation.samples import Look, Samples, directions, rows_of_reconstructions, rows_of_samples, shares_of
from diffusion_cli.evaluation.words import ENOUGH, OF_PICTURES, OF_SAMPLES
from diffusion_cli.features import Extractor, Features
from diffusion_cli.finding import load_codec, load_denoiser
from diffusion_cli.objectives.captions import captions
from diffusion_cli.options import option_of
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.runs import say
from diffusion_cli.samplers import Ancestral, Sampler
from diffusion_cli.sampling.maker import maker_of, node_of_sampler
from diffusion_cli.settings import Measurement
from diffusion_cli.signals import StopRequest
from diffusion_cli.stages import stages_of
from diffusion_cli.walking import check_walk

HELD_OUT, SAMPLES = 512, 10_000  # n=null: pictures of the data set, samples

# the whole table -> figures by name, and how they were made
Conclude = Callable[[Mapping[str, Tensor], StopRequest], tuple[dict[str, Figure], dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """Rows 0 .. count - 1 and what becomes of them. asked: what the rows depend on; words: of the file's name."""

    name: str
    count: int
    make: Make
    conclude: Conclude
    asked: dict[str, Any]
    words: list[str]


def of_pictures(found: Trained, dataset: Dataset, wanted: Measurement, compute: Compute) -> Part:
    """Raises UserError for what cannot be measured."""
    settings = wanted.root
    denoiser = load_denoiser(found, settings.weights, settings.trust).to(compute.device)
    compute.convolve(denoiser.network)
    stages = stages_of(found, settings.trust).to(compute.device)
    of_pixels = {"bits", "bound", "vlb"} & set(settings.metrics)
    if not stages.codec.bounded and of_pixels:
        raise ConfigError("metrics: bits, bound and vlb are of pixels, and this network works in latents: ask for [denoising]")
    if not (denoiser.schedule.gaussian and denoiser.schedule.white) and of_pixels:
        raise ConfigError(
            "metrics: bits, bound and vlb need white Gaussian noise, this schedule's is another: ask for metrics=[denoising]"
        )
    pictures, split = _loaded(dataset, settings.split or "test")
    count = min(settings.n or HELD_OUT, len(pictures))
    say(f"{count:,} pictures of the {split} split")
    facts = {"n": count, "split": split, "levels": settings.levels, "tolerance": settings.tolerance}
    asked = {**facts, "metrics": [word for word in settings.metrics if word in OF_PICTURES], "data": pictures.fingerprint}
    walk = None
    if "vlb" in settings.metrics:
        node = node_of_sampler(found.config["config"], wanted.sampler)
        walk = _ancestral(build(node, Sampler, "sampler", trust=settings.trust), denoiser)
        facts, asked = {**facts, "steps": walk.steps}, {**asked, "sampler": node}
    make = rows_of_pictures(denoiser, stages, pictures, bool(found.config["facts"]["taught"]), settings, compute, walk)

    def conclude(table: Mapping[str, Tensor], stop: StopRequest) -> tuple[dict[str, Figure], dict[str, Any]]:
        return {name: figures.over_pictures(table[name]) for name in NAMES if name in table}, facts

    return Part("pictures", count, make, conclude, asked, [split, f"n_{count}"])


def _ancestral(sampler: Sampler, denoiser: Denoiser) -> Ancestral:
    """ConfigError where a walk has no bound."""
    if not isinstance(sampler, Ancestral) or sampler.eta != 1 or sampler.variance == "all":
        raise ConfigError(
            "metrics: vlb is of the steps of an ancestral walk: add sampler=ddpm, and sampler.variance=small, large or learned"
        )
    try:
        check_walk(denoiser, sampler)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return sampler


def of_samples(found: Trained, dataset: Dataset, wanted: Measurement, metrics: list[str], compute: Compute) -> Part:
    """Raises UserError for what cannot be measured."""
    settings, facts = wanted.root, found.config["facts"]
    n = settings.n or SAMPLES
    look = look_of(wanted.features, metrics, facts, compute.device, settings.trust)
    maker = maker_of(wanted.request(), found, compute)
    pictures, split = _loaded(dataset, settings.split or "train")
    shares = None
    if facts["taught"]:
        shares = shares_of(pictures if split == "train" else _loaded(dataset, "train")[0])
    check_told(metrics, shares is not None, "texts" in facts, look.extractor, facts["classes"])
    warn(metrics, n)
    times = f", {settings.repeats} times" if settings.repeats > 1 else ""
    say(f"{n:,} samples{times} in {maker.sampler.steps} steps beside the {len(pictures):,} pictures of the {split} split")
    stages = replace(stages_of(found, settings.trust, without=("codec",)).to(compute.device), codec=maker.codec)
    texts = captions(pictures) if stages.texts is not None else ()
    samples = Samples(
        maker.denoiser, stages, maker.sampler, maker.guidance, maker.helper, shares, texts, settings.seed, compute
    )
    asked = {"n": n, "repeats": settings.repeats, "features": named(look.extractor, wanted.features)}
    asked |= {key: maker.asked[key] for key in ("sampler", "guidance", "guidance_checkpoint")}
    asked["labels"] = None if shares is None else "drawn from the training pictures"
    asked |= {"captions": "drawn from those of the pictures"} if texts else {}

    def conclude(table: Mapping[str, Tensor], stop: StopRequest) -> tuple[dict[str, Figure], dict[str, Any]]:
        reference = reference_of(pictures, split, look, settings.batch, compute.device, stop)
        found = figures.of_samples(metrics, figures.draws_of(table, n), reference.cloud, look.name)
        facts = {**asked, "split": split, "reference": reference.facts(), "steps": maker.sampler.steps, **calls_of(table)}
        return found, {**facts, "torch_fidelity": version("torch-fidelity")} if library(metrics) else facts

    key = {**asked, "metrics": metrics, "split": split, "shares": None if shares is None else shares.tolist()}
    key["precision"] = str(compute.autocast)
    words = [] if look.name is None else [look.name]
    words += [option_of("sampler", maker.asked["sampler"]), f"{maker.sampler.steps}", f"n_{n}"]
    return Part("samples", n * settings.repeats, lambda ids: rows_of_samples(samples, look, ids), conclude, key, words)


def of_reconstructions(found: Trained, dataset: Dataset, wanted: Measurement, metrics: list[str], compute: Compute) -> Part:
    """Of an autoencoder: each picture beside what comes back of it, and all beside all. Raises UserError."""
    settings, facts = wanted.root, found.config["facts"]
    codec = load_codec(found, settings.weights, settings.trust).to(compute.device)
    compute.convolve(codec)
    if wrong := [metric for metric in settings.metrics if metric not in ("reconstruction", *metrics)]:
        raise ConfigError(f"metrics={','.join(wrong)}: of a denoiser, and this is an autoencoder: ask for [reconstruction,fid]")
    look = look_of(wanted.features, metrics, facts, compute.device, settings.trust)
    pictures, split = _loaded(dataset, settings.split or "test")
    check_told(metrics, pictures.labels is not None, False, look.extractor, facts["classes"])
    n = min(settings.n or SAMPLES, len(pictures))
    warn(metrics, n)
    say(f"reconstructions of {n:,} pictures of the {split} split, beside these")
    asked = {"n": n, "split": split, "of": "reconstructions", "features": named(look.extractor, wanted.features)}

    def conclude(table: Mapping[str, Tensor], stop: StopRequest) -> tuple[dict[str, Figure], dict[str, Any]]:
        told = {name: figures.over_pictures(table[name]) for name in ERRORS if "reconstruction" in settings.metrics}
        told |= figures.of_reconstructions(metrics, table, n, look.name)
        return told, {**asked, "torch_fidelity": version("torch-fidelity")} if library(metrics) else asked

    key = {**asked, "metrics": metrics, "data": pictures.fingerprint, "precision": str(compute.autocast)}
    words = [] if look.name is None else [look.name]
    make = lambda ids: rows_of_reconstructions(codec, pictures, look, compute, ids)  # noqa: E731
    return Part("reconstructions", n, make, conclude, key, [*words, split, f"n_{n}"])


def look_of(
    features: Mapping[str, Any] | None, metrics: Sequence[str], facts: Facts, device: torch.device, trust: tuple[str, ...]
) -> Look:
    """What has to be kept of pictures for these metrics. Raises UserError where weights are missing or do not fit."""
    extractor: Extractor | None = None
    if features is not None and any(OF_SAMPLES[metric].features for metric in metrics):
        extractor = build(features, Features, "features", trust=trust).open(facts, device, trust)
        blind = [metric for metric in metrics if OF_SAMPLES[metric].logits and not extractor.logits]
        if blind:
            raise ConfigError(f"metrics={','.join(blind)}: features={extractor.name} gives no classes; try features=classifier")
    in_pixels = any(not OF_SAMPLES[metric].features for metric in metrics)
    return Look(extractor, directions(facts["channels"] * facts["image_size"] ** 2, device) if in_pixels else None)


def check_told(metrics: Sequence[str], told: bool, read: bool, extractor: Extractor | None, classes: list[str]) -> None:
    """ConfigError where the samples' classes or texts cannot be judged. told, read: whether they are made by label, by text."""
    words = ",".join(metric for metric in metrics if OF_SAMPLES[metric].labels)
    if words and not told:
        raise ConfigError(f"metrics={words}: this network was trained without labels, so no class is asked for")
    texts = ",".join(metric for metric in metrics if OF_SAMPLES[metric].texts)
    if texts and not read:
        raise ConfigError(f"metrics={texts}: this network was trained without texts, so no caption is asked for")
    if words and (extractor is None or extractor.classes != classes):
        raise ConfigError(f"metrics={words}: these features do not know the classes of this run; try features=classifier")


def warn(metrics: Sequence[str], n: int) -> None:
    """Says so where a figure of n samples says little."""
    if "fid" in metrics and n < ENOUGH:
        say(
            f"a Frechet distance of {n:,} samples is biased upwards and comparable at equal n alone: below {ENOUGH:,}, read kid"
        )


def named(extractor: Extractor | None, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if extractor is None else {"name": extractor.name, "digest": extractor.digest, "config": config}


def calls_of(table: Mapping[str, Tensor]) -> dict[str, float]:
    """Calls per picture of the network, and of the second model of the guidance where there is one."""
    return {word: float(table[word].double().mean()) for word in ("nfe", "nfe_helper") if word in table}


def library(metrics: Sequence[str]) -> bool:
    """Whether torch-fidelity computes some of them."""
    return any(OF_SAMPLES[metric].library for metric in metrics)


def _loaded(dataset: Dataset, split: str) -> tuple[Pictures, str]:
    """The split asked for, or the training pictures where there is no other, and which it is."""
    pictures = dataset.load(split)
    if pictures is None:
        say(f"the data set has no {split} split: these are pictures that the network was trained on")
        pictures, split = dataset.load("train"), "train"
    assert pictures is not None
    return pictures, split
