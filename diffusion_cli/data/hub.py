"""Any picture set of the Hugging Face hub, or the same set as local parquet files: one config for both.

`datasets` reads the two; its Arrow files are mapped from the disk, so a set larger than the memory does no harm. A set that
was read once is taken from the cache without asking the network.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_cli.data.dataset import Dataset, Raw, class_names, existing
from diffusion_cli.data.decoding import Encoded
from diffusion_cli.errors import DataError

if TYPE_CHECKING:
    import datasets

SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "valid", "val")}  # a word, and what sets call it
PROBE_SECONDS = 3  # the library itself would retry for 23


@dataclass(frozen=True)
class Column:
    """The pictures of a table, not decoded."""

    table: "datasets.Dataset"
    column: str
    place: str

    def __len__(self) -> int:
        return len(self.table)

    def read(self, rows: list[int]) -> list[Encoded]:
        cells = self.table[rows][self.column]
        return [b"" if cell is None else cell["bytes"] or Path(cell["path"] or "") for cell in cells]

    def name(self, row: int) -> str:
        return f"{self.place}, row {row}"


@dataclass(frozen=True, kw_only=True)
class Hub(Dataset):
    """repo: owner/name on the hub. path: a local copy of it, a parquet file or a folder with such files anywhere below.

    subset: the set's configuration, null for its only one. image, label, text: names of columns; null finds the first column of
    pictures, the first one of class labels, and a string column called text or caption.
    """

    repo: str | None = None
    path: str | None = None
    subset: str | None = None
    image: str | None = None
    label: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.repo is None and self.path is None:
            raise ValueError("a data set needs dataset.repo=OWNER/NAME on the hub or dataset.path=DIR with parquet files")

    def read(self, split: str) -> Raw | None:
        import datasets

        table = self._table(split)
        if table is None:
            return None
        place = f"{self.path or self.repo} ({split})"
        features = table.features
        image = self._column(features, self.image, "image", _of_type(features, datasets.Image))
        if image is None:
            raise DataError(
                f"{place} has no column of pictures; its columns are {', '.join(features)}: choose dataset.image=NAME"
            )
        label = self._column(features, self.label, "label", _of_type(features, datasets.ClassLabel))
        strings = [name for name in ("text", "caption") if name in features and _is_string(features[name])]
        text = self._column(features, self.text, "text", strings)
        ids, classes = (None, ()) if label is None else self._labels(table, label)
        texts = None if text is None else tuple("" if value is None else str(value) for value in table[text])
        encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        return Raw(Column(encoded, image, place), ids, classes, texts)

    def _column(self, features: Iterable[str], stated: str | None, key: str, found: list[str]) -> str | None:
        if stated is not None and stated not in features:
            raise DataError(f"dataset.{key}={stated}: there is no such column; the columns are {', '.join(features)}")
        return stated or next(iter(found), None)

    def _labels(self, table: "datasets.Dataset", column: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """Numbers [N], None where they are withheld, and the names of all classes. Numbers without names name themselves."""
        values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        if None in values:
            raise DataError(f"column {column!r} has no label in row {values.index(None)} of {self.path or self.repo}")
        names = getattr(table.features[column], "names", None)
        if names is None and all(isinstance(value, int) for value in values) and min(values, default=0) >= 0:
            names = map(str, range(max(values, default=0) + 1))
        if names is not None and min(values, default=0) < 0:  # -1 is how a test split withholds its labels
            return None, tuple(names)
        if names is not None:
            return np.array(values, dtype=np.int64), tuple(names)
        others = [other for split in (self.split, "test") if (other := self._table(split)) is not None]
        names = class_names(str(value) for other in others for value in other.unique(column))
        number = {name: number for number, name in enumerate(names)}
        return np.array([number[str(value)] for value in values], dtype=np.int64), names

    def _table(self, split: str) -> "datasets.Dataset | None":
        return _from_files(Path(self.path), split) if self.path is not None else _from_hub(str(self.repo), self.subset, split)


def _of_type(features: "datasets.Features", kind: type) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, kind)]


def _is_string(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


# ---------------------------------------------------------------------------------------------------------------- local files


def _from_files(path: Path, split: str) -> "datasets.Dataset | None":
    """The parquet files at or below `path` that belong to the split."""
    import datasets

    path = existing(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(
            f"dataset.path={path}: there is no parquet file in this folder or below it; picture files: dataset=folder"
        )
    chosen = [file for file in files if _split_of(file, path) in SPLITS.get(split, (split,))]
    if not chosen:
        return None
    with _one_line(f"dataset.path={path}"), _quiet():
        return datasets.load_dataset("parquet", data_files={"data": [str(file) for file in chosen]}, split="data")


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name begins with (train-00000-of-00003.parquet), or a folder's above it; else train."""
    names = [file.stem] if file == root else [*file.relative_to(root).parts[-2::-1], file.stem][::-1]
    known = {word for words in SPLITS.values() for word in words}
    heads = (name.lower().replace("_", "-").replace(".", "-").split("-")[0] for name in names)
    return next((head for head in heads if head in known), "train")


# ------------------------------------------------------------------------------------------------------------------- the hub


def _from_hub(repo: str, subset: str | None, split: str) -> "datasets.Dataset | None":
    import datasets

    try:
        with _offline(), _quiet():
            found = datasets.load_dataset(repo, subset)
    except (OSError, ValueError, datasets.exceptions.DatasetsError):  # not in the cache
        _probe(repo)
        with _one_line(f"dataset.repo={repo}"):
            found = datasets.load_dataset(repo, subset)
    return next((found[name] for name in SPLITS.get(split, (split,)) if name in found), None)


def _probe(repo: str) -> None:
    """Asks the hub one question that cannot take long, and says in one line what is wrong with the answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    way_out = "point to a local copy with dataset.path=DIR, or use dataset=digits (no download)"
    try:
        HfApi().dataset_info(repo, timeout=PROBE_SECONDS)
    except GatedRepoError:
        raise DataError(
            f"the hub asks you to accept the terms of {repo!r} first: https://huggingface.co/datasets/{repo}"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise DataError(f"the hub has no data set {repo!r} that you may read (dataset.repo=OWNER/NAME); {way_out}") from None
    except Exception as error:  # the hub's library changes its HTTP library, and so its errors, with every major version
        raise DataError(f"cannot reach the hub for {repo!r} ({type(error).__name__}); {way_out}") from None


@contextmanager
def _offline() -> Iterator[None]:
    """Lets the libraries look into their cache only. Both read their setting from a module, at every call."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no remarks for what takes a second. A download keeps its bars."""
    import datasets

    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """The libraries' errors, as one line."""
    import datasets
    import pyarrow

    try:
        yield
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{where} cannot be read as a data set: {reason[:300]}") from error
