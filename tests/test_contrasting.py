"""Contrastive training: its loss in closed form and beside transformers', duplicates, figures, runs that go on to the bit."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from captioned import written
from PIL import Image
from tiny import compose, figures, hashes, stopped, train

from diffusion_cli import config, pairs
from diffusion_cli.assembly import Facts, objective_of
from diffusion_cli.conditioning import learned
from diffusion_cli.data import Batch, Pictures
from diffusion_cli.errors import ConfigError, DataError
from diffusion_cli.evaluation.clip_score import matched, shuffled
from diffusion_cli.evaluation.retrieval import cosines, retrieval
from diffusion_cli.features import ClipRun
from diffusion_cli.finding import find, load_clip, load_denoiser
from diffusion_cli.objectives import Contrasting
from diffusion_cli.objectives.contrasting import info_nce
from diffusion_cli.randomness import Source

TINY = (
    "objective=contrasting", "model=clip", "model.width=16", "model.depth=1", "model.heads=2", "model.patch=4",
    "model.text_width=16", "model.text_depth=1", "model.text_heads=2", "model.embedding=16", "objective.vocabulary=300",
    "model.groups=DEFAULT", "model.multipliers=DEFAULT", "dataset=folder", "dataset.size=16", "dataset.channels=3",
    "dataset.test_share=0.2", "dataset.limit=0", "dataset.workers=0",
)  # fmt: skip
TEXTS = ("a red square", "a blue  Square", "A red square", "nothing at all")


def made(*more: str) -> Contrasting:
    words = [word for word in TINY if not word.endswith("DEFAULT")]
    node = config.check_train(compose(*words, "dataset.path=x", *more)).node
    facts = Facts(channels=3, image_size=16, classes=[], taught=[], fingerprint="", tokenizer=learned(TEXTS, 300))
    found = objective_of(node, facts)
    assert isinstance(found, Contrasting)
    return found


def pictures() -> Pictures:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Pictures(images, texts=TEXTS)


def batch() -> Batch:
    return Batch(pictures().images / 127.5 - 1, None, torch.arange(4))


def test_the_loss_in_closed_form() -> None:
    """Embeddings at right angles, scale s: -log(e^s / (e^s + B - 1)) both ways; equal ones: log B."""
    s = math.log(7)
    exact = math.log((7 + 3 - 1) / 7)
    assert (info_nce(s * torch.eye(3, dtype=torch.float64), torch.arange(3)) - exact).abs().max() < 1e-12
    assert (info_nce(torch.zeros(5, 5, dtype=torch.float64), torch.arange(5)) - math.log(5)).abs().max() < 1e-12
    lopsided = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # rows and columns are not the same question
    soft = math.log(1 + math.e)
    wanted = torch.tensor([(soft + math.log(2)) / 2, (math.log(2) + soft) / 2], dtype=torch.float64)
    assert (info_nce(lopsided, torch.arange(2)) - wanted).abs().max() < 1e-12


def test_the_loss_is_that_of_transformers() -> None:
    objective = made().eval()
    whole = Pictures(pictures().images, texts=("a red square", "a blue square", "nothing", "at all"))
    objective.meet(whole, torch.device("cpu"), False)
    loss, tallies = objective.loss(batch(), Source(0, torch.arange(4)))
    assert objective.tokens is not None
    theirs = objective.clip.model(
        input_ids=objective.tokens.long(), pixel_values=batch().x, return_loss=True
    )  # its loss is the mean of both directions
    assert abs(float(loss.detach().mean()) - float(theirs.loss.detach())) < 1e-6
    assert float(tallies["temperature"].sums) == pytest.approx(0.07, abs=1e-4)
    padded = objective.tokenizer.encode(whole.texts or (), 77).ids
    assert padded.shape[1] > objective.tokens.shape[1]
    assert (objective.clip.texts(padded) - objective.clip.texts(objective.tokens.long())).abs().max() < 1e-6


def test_the_same_caption_is_no_negative() -> None:
    """Of captions 0, 1, 0 (and one of its own), the two alike are left out of each other's sums."""
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same = torch.tensor([0, 1, 0, 2])
    found = info_nce(logits, same)
    for i in range(4):
        kept = [j for j in range(4) if j == i or same[j] != same[i]]
        rows = torch.logsumexp(logits[i, kept], 0) - logits[i, i]
        columns = torch.logsumexp(logits[kept, i], 0) - logits[i, i]
        assert abs(float(found[i] - (rows + columns) / 2)) < 1e-12
    objective = made()
    objective.meet(pictures(), torch.device("cpu"), False)
    assert objective.caption is not None and objective.caption[0] == objective.caption[2], "but for capitals the same"
    assert len(objective.caption.unique()) == 3


def test_the_temperature_is_clamped_and_can_come_back() -> None:
    objective = made("objective.sharpest=10")
    objective.meet(pictures(), torch.device("cpu"), False)
    assert objective.clip.logit_scale.exp() > 10
    loss, tallies = objective.loss(batch(), Source(0, torch.arange(4)))
    loss.mean().backward()
    assert float(objective.clip.logit_scale.detach()) == pytest.approx(math.log(10))
    assert objective.clip.logit_scale.grad is not None and float(objective.clip.logit_scale.grad) != 0
    assert float(tallies["temperature"].sums) == pytest.approx(0.1)


def test_pictures_are_moved_by_whole_pixels() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(50, 3, 8, 8)
    moved = made("objective.shift=2")._shifted(x, Source(0, torch.arange(50)))
    seen = set()
    for picture in moved[:, 0]:
        dy, dx = divmod(int(picture[4, 4]) - 36 + 18, 8)  # 18: two rows and two columns, so that nothing is negative
        seen.add((dy - 2, dx - 2))
        y, x_ = ((torch.arange(8) + d).clamp(0, 7) for d in (dy - 2, dx - 2))
        assert torch.equal(picture, (8 * y[:, None] + x_[None, :]).float())
    assert len(seen) > 15 and all(abs(d) <= 2 for pair in seen for d in pair)


def test_cosines_are_not_rounded_by_autocast() -> None:
    objective = made().eval()
    objective.meet(pictures(), torch.device("cpu"), False)
    u, v = (torch.nn.functional.normalize(torch.randn(4, 16), dim=1) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective.loss(batch(), Source(0, torch.arange(4)))
        found = cosines(u, v)
    assert loss.dtype == found.dtype == torch.float32 and torch.equal(found, u @ v.T)


def test_the_same_captions_are_asked_once() -> None:
    found = made().eval()
    images, texts, own, names = found._embedded(pictures(), 4, Source(0, torch.arange(4)), batch=3)
    assert own.tolist() == [0, 1, 0, 2] and names == [TEXTS[0], TEXTS[1], TEXTS[3]]
    assert images.shape == (4, 16) and texts.shape == (3, 16)
    assert (images.norm(dim=1) - 1).abs().max() < 1e-6


def test_retrieval_on_a_constructed_case() -> None:
    """Six pictures, five captions (pictures 0 and 5 share one), at angles that make the ranks known."""
    at = lambda *degrees: torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in map(math.radians, degrees)])  # noqa: E731
    own = torch.tensor([0, 1, 2, 3, 4, 0])
    found = retrieval(at(0, 20, 41, 60.5, 80, 170), at(1, 21, 59, 61, 171), own)
    # nearest caption: of 0: 0, 1: 1, 2: 2 (18 degrees away, 1 is 20), 3: 3, 4: 3, wrong, 5: 4, wrong
    assert found["image_to_text_1"] == pytest.approx(4 / 6)
    # nearest picture: of caption 0: 0, right; 1: 1, right; 2: 3, wrong; 3: 3, right; 4: 5, wrong
    assert found["text_to_image_1"] == pytest.approx(3 / 5)
    assert found["text_to_image_5"] == 1.0
    assert found["text_to_image_5_chance"] == pytest.approx((1 + 4 * 5 / 6) / 5)  # any five of six hold one of two
    assert found["text_to_image_1_chance"] == pytest.approx((2 / 6 + 4 / 6) / 5)
    assert (found["image_to_text_1_chance"], found["image_to_text_5_chance"]) == (1 / 5, 1.0)
    exact = retrieval(torch.eye(8), torch.eye(8), torch.arange(8))
    assert all(exact[f"{way}_{k}"] == 1.0 for way in ("text_to_image", "image_to_text") for k in (1, 5))
    wrong = retrieval(torch.eye(8), torch.eye(8), torch.arange(8).roll(1))
    assert wrong["text_to_image_1"] == wrong["image_to_text_1"] == 0.0


def test_an_encoder_that_says_the_same_of_everything_finds_nothing() -> None:
    """Equal cosines are no right answers: half of the others come first."""
    blind = torch.ones(20, 1)
    found = retrieval(blind, blind, torch.arange(20))
    assert all(found[f"{way}_{k}"] == 0.0 for way in ("text_to_image", "image_to_text") for k in (1, 5))


def test_chance_is_what_random_embeddings_reach() -> None:
    own = torch.tensor([*range(30), *range(10)])
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, float] = {}
    for _ in range(300):
        images, texts = torch.randn(40, 8, generator=generator), torch.randn(30, 8, generator=generator)
        for name, value in retrieval(images, texts, own).items():
            sums[name] = sums.get(name, 0) + value / 300
    for way, k in itertools.product(("text_to_image", "image_to_text"), (1, 5)):
        assert sums[f"{way}_{k}"] == pytest.approx(sums[f"{way}_{k}_chance"], rel=0.12), (way, k)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a hundred captioned squares, to its end."""
    folder = tmp_path_factory.mktemp("clip")
    written(folder / "data")
    return train(folder, *TINY, *BASE, f"dataset.path={folder / 'data'}", name="whole")


BASE = ("trainer.steps=120", "trainer.batch=32", "ema=none", "optimizer.lr=3e-3", "trainer.report_every=40",
        "trainer.evaluate_every=60", "trainer.save_every=0", "trainer.evaluate=100", "trainer.preview=30")  # fmt: skip


def test_it_learns_and_goes_on_to_the_bit(whole: Path) -> None:
    rows = figures(whole)
    last = [row for row in rows if "evaluate/text_to_image_1" in row][-1]
    assert last["evaluate/pictures_asked"] == 19 and last["evaluate/image_to_text_1_chance"] < 0.1
    assert last["evaluate/image_to_text_1"] > 0.5 and last["evaluate/text_to_image_1"] > 0.5
    assert any("train/temperature" in row and "train/accuracy" in row for row in rows)
    sheet = Image.open(whole / "samples" / "found_00000120.png").convert("RGB")
    colours = {colour for _, colour in sheet.getcolors(2**24) or []}
    assert (0, 158, 115) in colours, "right pictures are framed"
    words = (*TINY, *BASE, f"dataset.path={whole.parent / 'data'}")
    stopped(whole.parent, 47, *words, name="parts")
    parts = train(whole.parent, *words, name="parts")
    assert hashes(parts) == hashes(whole) and figures(parts) == rows


def test_a_checkpoint_is_whole(whole: Path) -> None:
    """Encoders and tokenizer from it alone; a picture fits its own text better than another's."""
    names = [f"a {colour} square at the {corner}" for colour in ("red", "blue") for corner in ("top left", "bottom right")]
    lines = (whole.parent / "data" / "metadata.csv").read_text().splitlines()[1:]
    files = {text.lower(): name for name, text in (line.split(",") for line in lines)}
    import numpy as np

    images = [torch.from_numpy(np.array(Image.open(whole.parent / "data" / files[name]))).permute(2, 0, 1) for name in names]
    judge = ClipRun(str(whole)).open(find(whole).config["facts"], torch.device("cpu"))
    assert judge.read is not None
    pixels = torch.stack(images)
    u, v = judge(pixels).features, judge.read(names)
    assert matched(u, v) > shuffled(u, v) + 0.2
    large = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert abs(matched(judge(large).features, v) - matched(u, v)) < 0.2, "of another size"
    assert shuffled(u[:2], v[:1].expand(2, -1)) != shuffled(u, v) and math.isnan(shuffled(u[:2], v[:1].expand(2, -1)))
    order = [1, 2, 3, 0]
    assert shuffled(u, v) == pytest.approx(float((u * v[order]).sum(1).mean()), abs=1e-6)


def test_what_it_is_for_is_said_in_one_line(whole: Path) -> None:
    with pytest.raises(ConfigError, match="is no denoiser but an encoder of pictures and texts: it makes no") as caught:
        load_denoiser(find(whole), "ema")
    assert len(str(caught.value).splitlines()) == 1
    run = train(whole.parent, name="denoiser")
    with pytest.raises(ConfigError, match="is no encoder of pictures and texts but a denoiser: train one with objective=contr"):
        load_clip(find(run), "ema")


def test_it_needs_captions(tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith(("dataset", "model.patch"))]
    with pytest.raises(DataError, match=r"these pictures have no captions.*dataset\.text=NAME") as caught:
        train(tmp_path, *words, "model.patch=4")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.patch=5", "patch is 5 and image_size 16"),
        ("model.heads=3", "width is 16, shared by 3 heads"),
        ("model.length=2", "length is 2"),
        ("objective.vocabulary=100", "vocabulary is 100"),
        ("objective.sharpest=0", "objective.sharpest is 0"),
    ],
)
def test_bad_values_are_said(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(word)


def test_missing_packages_are_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pairs.find_spec
    monkeypatch.setattr(pairs, "find_spec", lambda name: None if name == "tokenizers" else original(name))
    with pytest.raises(ConfigError, match=r"tokenizers is not installed.*pip install 'diffusion-cli\[text\]'"):
        made()
