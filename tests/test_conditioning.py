"""Texts to tokens: the tokenizer's round trip, cuts that are told, padding that is zero, encoders from a folder."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from text_encoders import TEXTS, encoders

from diffusion_cli.conditioning import ClipText, Conditioner, Pretrained, PromptCut, Tokenizer, learned, padding
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.models.clip import END, PAD, START, Clip

ENCODERS_HERE = ("clip", "t5", "umt5", "bert", "mpnet")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(learned(TEXTS, 300))


@pytest.mark.parametrize("text", ["grinning face", "a word never seen", "naïve ☂ 漢字", "it's 3.5 <|end|> (really)", ""])
def test_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    ids, mask, dropped = tokenizer.encode([text], 77)
    assert tokenizer.decode(ids[0].tolist()) == text.lower() and dropped == [""]
    assert ids[0, 0] == START and (ids[0] == END).sum() == 1 and (ids[0] == START).sum() == 1, "a mark in a text is only text"
    last = int((ids[0] == END).nonzero())
    assert mask[0, : last + 1].all() and not mask[0, last + 1 :].any() and (ids[0, last + 1 :] == PAD).all()


def test_capitals_and_spaces_make_no_difference(tokenizer: Tokenizer) -> None:
    one, two = tokenizer.encode(["Grinning \n FACE ", "grinning face"], 20).ids
    assert torch.equal(one, two)
    assert len(tokenizer.encode(["grinning face"], 20).ids[0][:4].unique()) == 4, "frequent words are one token each"


def test_it_is_the_same_text_in_every_process(tokenizer: Tokenizer) -> None:
    """What a run goes on with: the tokenizer is learned anew and compared."""
    code = f"from diffusion_cli.conditioning.tokenizer import learned; print(learned({TEXTS!r}, 300))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == learned(TEXTS, 300) == learned(list(reversed(TEXTS)), 300)
    assert Tokenizer(done.stdout).size == tokenizer.size <= 300


@pytest.mark.parametrize("text", ["", "{}", "no json", json.dumps({"version": "1.0"})])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        Tokenizer(text)


def clip_text(tokenizer: Tokenizer) -> ClipText:
    torch.manual_seed(0)
    clip = Clip(3, 8, tokenizer.size, width=8, depth=1, heads=1, patch=4, text_width=8, text_depth=1, text_heads=1, length=8)
    return ClipText(clip, tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CLIP text encoder and a T5 encoder of random weights, saved as the hub has them."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, (encoder, tokenizer) in encoders().items():
        encoder.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ENCODERS_HERE}


@pytest.fixture(params=["own", *ENCODERS_HERE])
def conditioner(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Conditioner:
    if request.param == "own":
        return clip_text(tokenizer)
    return Pretrained(str(request.getfixturevalue("folders")[request.param]))


def test_padding_is_zero_and_changes_nothing(conditioner: Conditioner) -> None:
    texts = ["", "cat", "grinning face of a cat"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = conditioner.encode(texts)  # [3, L, D]
    assert tokens.shape == (3, conditioner.length, conditioner.width) and tokens.dtype == torch.float32
    mask = conditioner.tokenised(texts).mask
    assert torch.equal(padding(tokens), ~mask) and mask.any(1).all() and not mask.all(1).any()
    assert torch.equal(conditioner.null(), tokens[0])
    for i, text in enumerate(texts):
        assert (conditioner.encode([text])[0] - tokens[i]).abs().max() < 1e-5
    assert not torch.equal(tokens[1], tokens[0]) and not any(p.requires_grad for p in conditioner.parameters())


def test_padding_is_not_read(conditioner: Conditioner) -> None:
    """The tokens are those that the encoder gives without any padding."""
    tokens = conditioner.tokenised(["grinning cat"])
    count = int(tokens.mask.sum())
    encoder = conditioner.encoder
    alone = encoder(input_ids=tokens.ids[:, :count]).last_hidden_state
    assert (conditioner.encode(["grinning cat"])[:, :count] - alone).abs().max() < 1e-5


def test_what_is_too_long_is_cut_and_told(conditioner: Conditioner) -> None:
    long = "grinning face of a cat the moon half seen grinning cat face"
    with pytest.warns(PromptCut, match=f"longer than {conditioner.length} tokens: .* is dropped: '.*face'") as caught:
        tokens = conditioner.encode([long, "cat"])
    assert len(caught) == 1
    assert not padding(tokens)[0].any() and padding(tokens)[1].any()
    ids, _, dropped = conditioner.tokenised([long])
    assert ids[0, -1] == END
    words = conditioner.tokenizer if isinstance(conditioner, ClipText) else conditioner.words  # type: ignore[attr-defined]
    kept = words.decode([i for i in ids[0].tolist() if i not in (START, END)]).strip()
    assert f"{kept} {dropped[0]}" == long or f"{kept}{dropped[0]}" == long


def test_a_shorter_length_can_be_asked_for(folders: dict[str, Path]) -> None:
    assert Pretrained(str(folders["clip"]), length=5).encode(["cat"]).shape == (1, 5, 16)
    assert Pretrained(str(folders["t5"]), length=30).encode(["cat"]).shape == (1, 30, 16)
    with pytest.raises(ConfigError, match=r"length is 13, and the text encoder .* reads 12 tokens at most"):
        Pretrained(str(folders["clip"]), length=13)


def test_positions_of_mpnet_begin_after_that_of_padding(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"length is 13, and the text encoder .* reads 12 tokens at most"):
        Pretrained(str(folders["mpnet"]), length=13)
    assert Pretrained(str(folders["mpnet"]), length=12).encode(["face cat " * 9]).isfinite().all()


def test_the_tokenizer_may_lie_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    """As in a diffusers pipeline: text_encoder/ and tokenizer/."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["clip"] / name).read_bytes())
    apart = Pretrained(str(tmp_path), tokenizer=str(folders["clip"]))
    assert torch.equal(apart.encode(["cat"]), Pretrained(str(folders["clip"])).encode(["cat"]))


def test_a_whole_clip_gives_its_text_half(folders: dict[str, Path], tmp_path: Path) -> None:
    """As the hub has them: one folder with both halves."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    text = CLIPTextModel.from_pretrained(folders["clip"])
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8}
    both = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision | {"patch_size": 4}))
    both.text_model.load_state_dict(text.state_dict())
    both.save_pretrained(tmp_path)
    found = Pretrained(str(tmp_path), tokenizer=str(folders["clip"]))
    assert (found.width, found.length) == (16, 12)
    assert torch.equal(found.encode(["cat"]), Pretrained(str(folders["clip"])).encode(["cat"]))


def test_pickles_and_other_kinds_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["clip"] / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(StorageError, match="cannot be used") as caught:
        Pretrained(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="is a gpt2: there is clip"):
        Pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="hf download no/such --include"):
        Pretrained("no/such")
