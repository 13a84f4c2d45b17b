"""An export from its checked settings: find, build, make the files and the card, write them as one folder, push it if asked."""

import time
from collections.abc import Callable
from pathlib import Path

from diffusion_cli import storage
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting import hub, record
from diffusion_cli.exporting.card import PICTURE, card_of
from diffusion_cli.exporting.diffusers_folder import diffusers
from diffusion_cli.exporting.folder import folder, safetensors_file
from diffusion_cli.exporting.graphs import onnx, torch_export
from diffusion_cli.exporting.parcel import Model, Parcel
from diffusion_cli.exporting.story import Story, story_of
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.runs import say
from diffusion_cli.settings import Export

FORMS: dict[str, Callable[[Model], Parcel]] = {
    "folder": folder,
    "safetensors": safetensors_file,
    "diffusers": diffusers,
    "onnx": onnx,
    "torch_export": torch_export,
}


def export(settings: Export) -> Path:
    """Writes what the settings ask for and returns its folder. Raises UserError."""
    began = time.perf_counter()
    found = find(settings.ckpt)
    if not isinstance(found, Checkpoint):
        raise ConfigError(f"ckpt={settings.ckpt} is a pipeline already: diffusion-export writes what a run here has trained")
    target, asked = record.place(settings, found), record.asked_of(settings, found)
    before = record.standing(target, asked)
    account = hub.login(settings.repo) if settings.repo is not None else None
    model = Model(found, load_denoiser(found, settings.weights, settings.trust), settings)
    story = story_of(model)
    if before is None or before.told != story.digest:
        _write(target, model, story, before)
        say(f"{time.perf_counter() - began:.1f} s: {target}, from {found.folder}, {settings.weights} weights")
    else:
        say(f"{target} holds this export already")
    if account is not None:
        hub.push(account, target, list(_record(target, asked).files), settings)
    return target


def _write(target: Path, model: Model, story: Story, before: record.Record | None) -> None:
    """The folder whole; or, where it is there and the run has new things to say, its new card."""
    parcel = FORMS[model.settings.written](model)
    files = {record.CARD: card_of(model, story, parcel), **parcel.files}
    if story.picture is not None:
        files[PICTURE] = story.picture
    asked = record.asked_of(model.settings, model.found)
    if before is None:
        files[record.NAME] = record.Record(asked, story.digest, record.digests(files)).packed()
        storage.make_folder(target.parent)
        if target.is_dir():  # and empty
            storage.remove(target)
        storage.commit(target, files)
        return
    if record.edited(target, before):
        say(f"{target / record.CARD} was edited by hand: it stays as it is, though the run has new figures")
        return
    new = {name: files[name] for name in (record.CARD, PICTURE) if name in files}
    digests = {**before.files, **record.digests(new)}
    new[record.NAME] = record.Record(asked, story.digest, digests).packed()
    storage.write_all({target / name: data for name, data in new.items()})


def _record(target: Path, asked: dict[str, object]) -> record.Record:
    found = record.standing(target, asked)
    assert found is not None
    return found
