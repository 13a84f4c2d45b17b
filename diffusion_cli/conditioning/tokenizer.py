"""From texts to tokens and back: byte pairs learned from the captions themselves (Sennrich et al. 2016), lower-cased.

    "Grinning  face"  ->  START  grin ning face  END  PAD PAD ...

Bytes are the alphabet (Radford et al. 2019, "Language models are unsupervised multitask learners"), so no text is unknown. The
whole tokenizer is one JSON text, which a checkpoint carries among the facts of its data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.models.clip import END, PAD, START

MARKS = ("<|start|>", "<|end|>", "<|pad|>")  # in the order of START, END and PAD
SMALLEST = 256 + len(MARKS)


class Tokens(NamedTuple):
    """ids: int64 [B, L], padded; mask: bool [B, L], true but for padding; dropped: of each text what did not fit, or ""."""

    ids: Tensor
    mask: Tensor
    dropped: list[str]


def learned(texts: Sequence[str], vocabulary: int) -> str:
    """The JSON of a tokenizer with at most that many entries, learned from the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Strip(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(MARKS), initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made.to_str()


class Tokenizer:
    """The tokenizer of that JSON. ValueError: it is none, or not one of `learned`."""

    def __init__(self, text: str):
        from tokenizers import Tokenizer as Made

        try:
            self._made = Made.from_str(text)
        except Exception as error:  # of the library in Rust, which raises nothing narrower
            raise ValueError(f"the text is no tokenizer: {error}") from None
        if [self._made.token_to_id(mark) for mark in MARKS] != [START, END, PAD]:
            raise ValueError("the tokenizer has other marks for start, end and padding")
        self._made.encode_special_tokens = True  # a caption that contains a mark is only text

    @property
    def size(self) -> int:
        """Tokens there are."""
        return int(self._made.get_vocab_size())

    def encode(self, texts: Sequence[str], length: int) -> Tokens:
        """START, the text, END, then padding up to `length`; what is longer is cut before END."""
        ids = torch.full((len(texts), length), PAD)  # [B, L]
        dropped = []
        for row, found in zip(ids, self._made.encode_batch(list(texts)), strict=True):
            kept = found.ids[: length - 2]
            row[: len(kept) + 2] = torch.tensor([START, *kept, END])
            dropped.append(self.decode(found.ids[length - 2 :]))
        return Tokens(ids, ids != PAD, dropped)

    def whole(self, length: int) -> bytes:
        """The JSON of the tokenizer that adds the marks, cuts and pads by itself, as `encode` does."""
        from tokenizers import Tokenizer as Made
        from tokenizers import processors

        made = Made.from_str(self._made.to_str())
        template = f"{MARKS[START]} $A {MARKS[END]}"
        made.post_processor = processors.TemplateProcessing(template, None, [(MARKS[START], START), (MARKS[END], END)])
        made.enable_truncation(length)
        made.enable_padding(pad_id=PAD, pad_token=MARKS[PAD], length=length)
        return str(made.to_str()).encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without marks."""
        return str(self._made.decode(list(ids), skip_special_tokens=True)).strip()
