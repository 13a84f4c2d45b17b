"""Where a pipeline is: a folder of this machine, or hf://OWNER/NAME[/PART][@revision] on the Hugging Face hub.

PART is a folder of the repository, such as the vae of a pipeline, which is an autoencoder of its own.

The hub is asked one short question first; where it cannot be reached, what was fetched before is taken from its cache
(HF_HOME, HF_HUB_CACHE; HF_HUB_OFFLINE=1 asks nothing). model_index.json comes first, and weights only when it can be read.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from diffusion_cli.errors import ConfigError, DataError, StorageError
from diffusion_cli.pretrained import files, pipelines, texts
from diffusion_cli.pretrained.trained import Pretrained
from diffusion_cli.runs import say

PROBE_SECONDS = 5  # the library itself would wait for ever
OUTPUTS = Path("outputs")
_HUB = re.compile(  # pathlib makes hf:/ of hf://
    r"hf:/+(?P<repo>[^/@]+(?:/[^/@]+)?)(?:/(?P<part>\w[\w.-]*))?(?:@(?P<revision>\S+))?/?"
)


class Repo(NamedTuple):
    """part: a folder of it that is meant, or "" for all; revision: None for its newest."""

    name: str
    part: str
    revision: str | None


def on_hub(place: str) -> bool:
    return place.startswith("hf:")


def from_hub(place: str, word: str) -> Pretrained:
    """hf://OWNER/NAME[/PART][@revision] -> what is there, in the hub's cache. word: the setting, for messages. UserError."""
    match = _HUB.fullmatch(place)
    if match is None:
        raise ConfigError(f"{word}={place}: write hf://OWNER/NAME, hf://OWNER/NAME/FOLDER, or either with @REVISION")
    repo = Repo(match["repo"], match["part"] or "", match["revision"])
    names = _names(repo, word)
    if names is None:
        root = _cached(repo, word)
    elif repo.part:
        root = _fetched(repo, _wanted(names, repo, [(repo.part, files.STEM)]), word)
    else:
        words = [files.INDEX, files.FACTS, "scheduler_config.json", f"{pipelines.SCHEDULER}/*.json"]
        parts = [(name, files.STEM) for name in ("", *pipelines.NETWORKS)]
        if files.INDEX in names:
            index = _fetched(repo, [files.INDEX], word) / files.INDEX
            kind = pipelines.kind_of(files.parsed(index), f"{word}={place}")
            parts += [] if kind.codec is None else [(kind.codec, files.STEM)]
            parts += [] if kind.texts is None else [(texts.ENCODER, files.TEXT_STEM)]
            words += [] if kind.texts is None else [f"{texts.TOKENIZER}/{pattern}" for pattern in texts.WORDS]
        root = _fetched(repo, words + _wanted(names, repo, parts), word)
    folder = root / repo.part
    if not pipelines.is_pipeline(folder):
        raise ConfigError(f"{word}={place} is neither a pipeline of diffusers nor an autoencoder: it has no {files.INDEX}")
    said = f"hf://{'/'.join(part for part in (repo.name, repo.part) if part)}@{root.name}"
    return pipelines.read(folder, said, OUTPUTS / pipelines.plain(repo.name))


def from_folder(folder: Path) -> Pretrained:
    """The pipeline in a folder. Raises UserError."""
    return pipelines.read(folder, str(folder), OUTPUTS / pipelines.plain(folder.resolve().name))


def _names(repo: Repo, word: str) -> list[str] | None:
    """All files of the repository; None where the hub cannot be asked. Raises UserError where it answers no."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(repo.name, revision=repo.revision, timeout=PROBE_SECONDS)
    except GatedRepoError:
        raise ConfigError(
            f"{word}: {repo.name} is gated: accept its terms on https://huggingface.co/{repo.name}, then hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{word}: {repo.name} has no revision {repo.revision} on the hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ConfigError(
            f"{word}: the hub has no model {repo.name} that you may read (a private one needs hf auth login or HF_TOKEN)"
        ) from None
    except Exception as error:  # the hub's library changes its HTTP library, and so its errors, with every major version
        say(f"the hub cannot be asked for {repo.name} ({type(error).__name__}): looking into its cache")
        return None
    return [file.rfilename for file in info.siblings or []]


def _wanted(names: list[str], repo: Repo, parts: list[tuple[str, str]]) -> list[str]:
    """Names and patterns of what is read. parts: folders, and the stem of their weights' names. Raises ConfigError where the
    weights of one are pickles alone."""
    wanted: list[str] = []
    for part, stem in parts:
        place = f"{part}/" if part else ""
        wanted += [f"{place}config.json", f"{place}{stem}.safetensors.index.json"]
        whole = _matching(names, f"{place}{stem}.safetensors", f"{place}{stem}-*.safetensors")
        there = whole or _matching(names, f"{place}{stem}.*.safetensors")
        pickled = [f"{place}{name}" for name in files.PICKLES if f"{place}{name}" in names]
        if pickled and not there:
            raise ConfigError(files.pickles_alone(f"hf://{repo.name}/{pickled[0]}"))
        wanted += there
    return wanted


def _matching(names: list[str], *patterns: str) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _fetched(repo: Repo, patterns: list[str], word: str) -> Path:
    """The folder of the hub's cache, with these files in it. Raises StorageError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo.name, revision=repo.revision, allow_patterns=patterns))
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:200]
        raise StorageError(f"{word}: {repo.name} cannot be fetched ({type(error).__name__}: {reason})") from None


def _cached(repo: Repo, word: str) -> Path:
    """The folder of the hub's cache as it is. Raises DataError."""
    from huggingface_hub import try_to_load_from_cache

    for name in (files.INDEX, *(f"{part}/config.json" for part in (repo.part, *pipelines.NETWORKS) if part), "config.json"):
        path = try_to_load_from_cache(repo.name, name, revision=repo.revision)
        if isinstance(path, str):
            return Path(path.removesuffix(name))
    raise DataError(
        f"{word}: the hub cannot be reached, and {repo.name} is not in its cache: run hf download {repo.name} where there is a "
        "network, or give a folder that has it"
    )
