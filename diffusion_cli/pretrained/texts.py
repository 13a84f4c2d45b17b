"""The text encoder of a pipeline in our words: the node that makes it, and the facts of its tokens, read off its JSON alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_cli.conditioning.pretrained import ENCODERS, LONGEST
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.pretrained import files

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
WORDS = ("*.json", "*.txt", "*.model")  # files of a tokenizer


@dataclass(frozen=True)
class Reading:
    """How a kind of pipeline reads texts. length: tokens of each; None: as many as its tokenizer states. masked: is padding
    zero, or did its network learn to read what the encoder says of it?"""

    length: int | None = None
    masked: bool = True


@dataclass(frozen=True)
class Texts:
    """width, length: of the tokens. digest: of the files that they come of."""

    node: dict[str, Any]
    width: int
    length: int
    digest: str


def texts_of(folder: Path, reading: Reading, place: str) -> Texts:
    """The text encoder and the tokenizer in a pipeline's folder. place: whose, for messages. Raises UserError."""
    encoder, words = folder / ENCODER, folder / TOKENIZER
    told = files.parsed(encoder / "config.json")
    kind, width = told.get("model_type"), told.get("d_model", told.get("hidden_size"))
    if kind not in ENCODERS:
        raise ConfigError(f"{place}: its text encoder is a {kind}, and {', '.join(ENCODERS)} are read here")
    length = reading.length or _stated(told, files.parsed(words / "tokenizer_config.json"))
    if not isinstance(width, int) or not isinstance(length, int):
        raise StorageError(f"{place}: its text encoder's config.json does not say how wide its tokens are, and how many")
    node = {
        "_target_": "diffusion_cli.stages.TextEncoder",
        "name": str(encoder),
        "tokenizer": str(words),
        "length": length,
        "masked": reading.masked,
    }
    return Texts(node, width, length, digest_of(encoder, words))


def digest_of(encoder: Path, words: Path) -> str:
    """One SHA-256 of an encoder's weights and the files of its tokenizer, wherever the two lie. Raises StorageError."""
    weights = [encoder / "config.json", *files.weights_in(encoder, files.TEXT_STEM)]
    return files.joined(
        [files.digest_of(encoder, weights), files.digest_of(words, [path for pattern in WORDS for path in words.glob(pattern)])]
    )


def _stated(encoder: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Any:
    """Tokens of a text: the least of what the two say."""
    said = [encoder.get("max_position_embeddings"), tokenizer.get("model_max_length")]
    return min((n for n in said if isinstance(n, int | float) and n < LONGEST), default=None)
