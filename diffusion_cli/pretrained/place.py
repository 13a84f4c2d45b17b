"""Where a pipeline is: a folder of this machine, or hf://OWNER/NAME[@revision] on the Hugging Face hub.

The hub is asked one short question first; where it cannot be reached, what was fetched before is taken from its cache
(HF_HOME, HF_HUB_CACHE; HF_HUB_OFFLINE=1 asks nothing). model_index.json comes first, and weights only when it can be read.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from diffusion_cli.errors import ConfigError, DataError, StorageError
from diffusion_cli.pretrained import files, pipelines
from diffusion_cli.pretrained.trained import Pretrained
from diffusion_cli.runs import say

PROBE_SECONDS = 5  # the library itself would wait for ever
OUTPUTS = Path("outputs")
_HUB = re.compile(r"hf:/+(?P<repo>[^/@]+(?:/[^/@]+)?)(?:@(?P<revision>\S+))?/?")  # pathlib makes hf:/ of hf://


class Repo(NamedTuple):
    name: str
    revision: str | None


def on_hub(place: str) -> bool:
    return place.startswith("hf:")


def from_hub(place: str, word: str) -> Pretrained:
    """hf://OWNER/NAME[@revision] -> the pipeline in the hub's cache. word: the setting, for messages. Raises UserError."""
    match = _HUB.fullmatch(place)
    if match is None:
        raise ConfigError(f"{word}={place}: write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    repo = Repo(match["repo"], match["revision"])
    names = _names(repo, word)
    if names is None:
        folder = _cached(repo, word)
    else:
        if files.INDEX in names:
            index = _fetched(repo, [files.INDEX], word) / files.INDEX
            pipelines.reader_of(files.parsed(index), f"{word}={place}")
        folder = _fetched(repo, _wanted(names, repo), word)
    if not pipelines.is_pipeline(folder):
        raise ConfigError(f"{word}={place} is no pipeline of diffusers: it has no {files.INDEX}")
    return pipelines.read(folder, f"hf://{repo.name}@{folder.name}", OUTPUTS / pipelines.plain(repo.name))


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


def _wanted(names: list[str], repo: Repo) -> list[str]:
    """Names and patterns of what is read of a pipeline. Raises ConfigError where its weights are pickles alone."""
    stems = [f"{place}{files.STEM}" for place in ("", *(f"{name}/" for name in pipelines.NETWORKS))]
    words = [files.INDEX, files.FACTS, "config.json", "scheduler_config.json", f"{pipelines.SCHEDULER}/*.json"]
    words += [f"{name}/config.json" for name in pipelines.NETWORKS] + [f"{stem}.safetensors.index.json" for stem in stems]
    whole = [f"{stem}{end}" for stem in stems for end in (".safetensors", "-*.safetensors")]
    weights = [name for name in names if any(fnmatch(name, pattern) for pattern in whole)]
    variants = [name for name in names if any(fnmatch(name, f"{stem}.*.safetensors") for stem in stems)]
    pickled = [name for name in names if name in [f"{stem}.bin" for stem in stems]]
    if not weights and not variants and pickled:
        raise ConfigError(files.pickles_alone(f"hf://{repo.name}/{pickled[0]}"))
    return [*words, *(weights or variants)]


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

    for name in (files.INDEX, *(f"{network}/config.json" for network in pipelines.NETWORKS)):
        path = try_to_load_from_cache(repo.name, name, revision=repo.revision)
        if isinstance(path, str):
            return Path(path.removesuffix(name))
    raise DataError(
        f"{word}: the hub cannot be reached, and {repo.name} is not in its cache: run hf download {repo.name} where there is a "
        "network, or give a folder that has it"
    )
