"""Pictures: what is read, what is refused, and that batch number k is the same by whatever way one comes to it."""

import csv
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import diffusion_cli.data
from diffusion_cli.data import Batches, Digits, Folder, Hub, Pictures, streaming
from diffusion_cli.data.decoding import Unreadable, decode
from diffusion_cli.data.pictures import Arrays, Streamed
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.errors import DataError
from diffusion_cli.pace import Pace

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared" / "data"
OPTIONS = sorted((REPO / "configs" / "dataset").glob("*.yaml"))
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not on this machine")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Arrow files of `datasets` go to a temporary folder."""
    import datasets

    folder = tmp_path_factory.getbasetemp() / "arrow"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def colours(count=10, size=8, channels=3):
    """uint8 [count, size, size, channels]: every picture different, none symmetric."""
    draws = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return draws[..., 0] if channels == 1 else draws


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def streamed(count=10, workers=0, max_bad=0.0, source=None, size=8):
    source = source or Arrays(colours(count, size))
    return Streamed(source, np.arange(count), size, 3, "squeeze", workers, max_bad)


def first(batches, count, start=0):
    return list(itertools.islice(batches.starting_at(start), count))


def same(a, b):
    labels = (a.label is None and b.label is None) or torch.equal(a.label, b.label)
    return torch.equal(a.x, b.x) and torch.equal(a.ids, b.ids) and labels


# ------------------------------------------------------------------------------------------------------------------- pixels


def test_every_pixel_value_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_float(pixels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


# ------------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_1797_of_the_source():
    train, test = (Digits(size=8, channels=1).load(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1497, 300)
    both = torch.cat([train.labels, test.labels]).bincount().tolist()
    assert both == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # the counts of the UCI file
    assert test.labels.bincount().tolist() == [30] * 10
    assert train.images.shape == (1497, 1, 8, 8) and train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64 and train.classes == tuple("0123456789")
    every = torch.cat([train.images, test.images])
    assert every.unique().tolist() == [round(255 * level / 16) for level in range(17)]
    # first row of the source: 0 0 5 13 9 1 0 0, a zero
    assert train.images[0, 0, 0].tolist() == [round(255 * level / 16) for level in (0, 0, 5, 13, 9, 1, 0, 0)]
    assert abs(every.double().mean().item() * 16 / 255 - 4.8842) < 0.01  # mean of the source in its own units


def test_digits_need_neither_datasets_nor_torchvision():
    code = (
        "import sys; from diffusion_cli.data import Digits; Digits(size=8, channels=1).load();"
        "print([name for name in ('datasets', 'pandas', 'torchvision') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPO).stdout == "[]\n"


def test_digits_in_another_size_and_in_colour():
    pictures = Digits(size=16, channels=3, limit=5).load()
    assert pictures.images.shape == (5, 3, 16, 16)
    assert torch.equal(pictures.images[:, 0], pictures.images[:, 2])


# ------------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: file.stem)
def test_an_option_states_every_key_of_its_constructor_and_no_other(file):
    text = file.read_text()
    node = yaml.safe_load(text)
    target = getattr(diffusion_cli.data, node.pop("_target_").removeprefix("diffusion_cli.data."))
    assert text.startswith("# ") and len(text.splitlines()[0]) < 90
    assert set(node) == set(inspect.signature(target).parameters)
    dataset = target(**node)
    assert (dataset.size, dataset.channels) == (node["size"], node["channels"])


def test_a_set_without_a_name_or_a_path_says_what_it_wants():
    with pytest.raises(ValueError, match=r"dataset.repo=OWNER/NAME.*dataset.path=DIR"):
        Hub(size=8, channels=3)


# ---------------------------------------------------------------------------------------------------------------- real data


@needs_shared
def test_mnist_test_split():
    pictures = Hub(path=str(SHARED / "mnist"), size=28, channels=1).load("test")
    assert pictures.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    x = pictures.images.double() / 255
    assert abs(x.mean() - 0.1325) < 1e-4 and abs(x.std() - 0.3105) < 1e-4
    assert pictures.classes == tuple("0123456789") and pictures.skipped == ()


@needs_shared
def test_cifar_test_split():
    pictures = Hub(path=str(SHARED / "cifar10"), size=32, channels=3).load("test")
    assert pictures.labels.bincount().tolist() == [1000] * 10 and pictures.classes == CIFAR_CLASSES
    x = pictures.images.double() / 255
    assert (x.mean((0, 2, 3)) - torch.tensor([0.4942, 0.4851, 0.4504])).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - torch.tensor([0.2467, 0.2429, 0.2616])).abs().max() < 1e-4


@needs_shared
def test_a_path_may_be_any_folder_above_the_files_or_one_file():
    folder = SHARED / "cifar10" / "plain_text"
    paths = (folder.parent, folder, folder / "test-00000-of-00001.parquet")
    found = [Hub(path=str(path), size=32, channels=3, limit=20, split="test").load().fingerprint for path in paths]
    assert len(set(found)) == 1
    train = Hub(path=str(folder), size=32, channels=3, limit=20).load()
    assert len(train) == 20 and train.fingerprint not in found


@needs_shared
def test_a_class_filter_keeps_the_numbers_of_the_classes():
    options = dict(path=str(SHARED / "mnist"), size=28, channels=1)
    pictures = Hub(**options, classes=(1, "4", 8)).load("test")
    assert pictures.labels.unique().tolist() == [1, 4, 8] and pictures.num_classes == 10
    assert len(pictures) == 1135 + 982 + 974


@needs_shared
def test_an_unknown_class_is_told_the_names():
    options = dict(path=str(SHARED / "cifar10"), size=32, channels=3, split="test", limit=5)
    with pytest.raises(DataError, match=r"'automobil' \(did you mean 'automobile'\?\).*airplane.*truck"):
        Hub(**options, classes=("automobil",)).load()
    with pytest.raises(DataError, match=r"there is no class 10; the classes are airplane"):
        Hub(**options, classes=(10,)).load()


@needs_shared
def test_captions_and_columns():
    options = dict(path=str(SHARED / "openmoji"), size=32, channels=3, limit=6)
    pictures = Hub(**options).load()
    assert pictures.labels is None and len(pictures.texts) == 6 and all(map(str.strip, pictures.texts))
    grouped = Hub(**options, label="group").load()
    assert len(grouped.classes) == 11 and grouped.classes == tuple(sorted(grouped.classes))
    with pytest.raises(DataError, match=r"dataset.label=groups: there is no such column; the columns are image, text, group"):
        Hub(**options, label="groups").load()
    with pytest.raises(DataError, match="labels=true, but this data set has no labels"):
        Hub(**options, labels=True).load()


@needs_shared
def test_a_held_out_share_is_disjoint_complete_and_counted():
    options = dict(path=str(SHARED / "butterflies"), size=8, channels=3)
    every = Hub(**options).load()
    assert Hub(**options).load("test") is None
    train, test = (Hub(**options, test_share=0.1).load(split) for split in ("train", "test"))
    assert (len(every), len(train), len(test)) == (1000, 900, 100)
    parts = sorted(picture.numpy().tobytes() for picture in torch.cat([train.images, test.images]))
    assert parts == sorted(picture.numpy().tobytes() for picture in every.images)
    assert not torch.equal(test.images, every.images[:100])  # spread: the head of a sorted file would be one class
    again = Hub(**options, test_share=0.1).load("test")
    assert torch.equal(test.images, again.images)


# ------------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        ("squeeze", [[0, 0, 255, 255]] * 4),
        ("crop", [[0, 0, 255, 255]] * 4),
        ("pad", [[0, 0, 0, 0], [0, 0, 255, 255], [0, 0, 255, 255], [0, 0, 0, 0]]),
    ],
)
def test_the_three_ways_to_a_square(resize, expected):
    wide = np.zeros((40, 80), dtype=np.uint8)
    wide[:, 40:] = 255
    wide[:, :10] = wide[:, 70:] = 128 if resize == "crop" else wide[0, 0]  # what the crop cuts off
    wide[:, 40:] = np.where(wide[:, 40:] == 128, 128, 255)
    found = decode(png(wide), size=4, channels=1, resize=resize)
    assert found.shape == (1, 4, 4)
    assert np.abs(found[0].astype(int) - expected).max() <= 20  # the filter rings a little at the edge


@pytest.mark.parametrize("resize", ["squeeze", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (7, 5), (8, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_shape_becomes_the_square_asked_for(resize, shape, channels):
    assert decode(png(np.full(shape, 7, dtype=np.uint8)), size=8, channels=channels, resize=resize).shape == (channels, 8, 8)


def test_grey_becomes_three_equal_channels_and_colour_its_luminance():
    grey, colour = colours(1, channels=1)[0], colours(1)[0]
    options = dict(size=8, resize="squeeze")
    assert (decode(png(grey), channels=3, **options) == grey).all()
    luminance = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(decode(png(colour), channels=1, **options)[0] - luminance).max() <= 1
    assert (decode(png(colour), channels=3, **options) == colour.transpose(2, 0, 1)).all()  # right size: untouched


def test_every_mode_of_a_picture_is_read():
    def read(image, format="PNG", **options):
        file = io.BytesIO()
        image.save(file, format, **options)
        return decode(file.getvalue(), size=8, channels=3, resize="squeeze")[:, 4, 4].tolist()

    red = Image.new("RGB", (8, 8), (200, 0, 0))
    assert read(red.convert("P", palette=Image.Palette.ADAPTIVE)) == [200, 0, 0]
    assert read(Image.new("RGBA", (8, 8), (200, 0, 0, 0))) == [255, 255, 255]  # transparent: white
    assert read(Image.new("LA", (8, 8), (0, 255))) == [0, 0, 0]
    assert read(Image.new("1", (8, 8), 1)) == [255, 255, 255]
    assert read(Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16))) == [100, 100, 100]  # 16 bits
    assert np.abs(np.array(read(red.convert("CMYK"), "JPEG", quality=95)) - [200, 0, 0]).max() <= 4
    assert np.abs(np.array(read(red, "WEBP", lossless=True)) - [200, 0, 0]).max() <= 1
    transparent = Image.new("P", (8, 8), 0)
    assert read(transparent, transparency=0) == [255, 255, 255]


def test_a_turned_photograph_stands_upright():
    left_dark = np.full((8, 8), 255, dtype=np.uint8)
    left_dark[:, :4] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: left becomes top
    found = decode(png(left_dark, exif=exif), size=8, channels=1, resize="squeeze")[0]
    assert (found[:4] == 0).all() and (found[4:] == 255).all()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A hundred bytes that claim side x side pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


def tiff():
    file = io.BytesIO()
    Image.fromarray(colours(1)[0]).save(file, "TIFF")
    return file.getvalue()


BAD = {
    "truncated": png(colours(1, 32)[0])[:-900],
    "empty": b"",
    "text": b"<html>404 not found</html>",
    "bomb": bomb(20_000),
    "large": bomb(10_000),  # Pillow only warns
    "format": tiff(),
    "damaged": png(colours(1)[0]).replace(b"IDAT", b"IDAX"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_unreadable_and_nothing_else(name, recwarn):
    with pytest.raises(Unreadable) as raised:
        decode(BAD[name], size=8, channels=3, resize="squeeze")
    assert str(raised.value) and "\n" not in str(raised.value) and "0x" not in str(raised.value)
    assert ("more than 64,000,000 pixels" in str(raised.value)) == (name == "large")
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------------------- folders


def fill(folder, pictures):
    for name, content in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def test_a_folder_takes_its_classes_from_subfolders(tmp_path):
    one, two, three = map(png, colours(3))
    path = fill(tmp_path, {"dog/deep/er/a.png": one, "cat/b.PNG": two, "cat/c.jpg": three, "cat/notes.txt": b"x"})
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    pictures = Folder(path=path, size=8, channels=3).load()
    assert pictures.classes == ("cat", "dog") and pictures.labels.tolist() == [0, 0, 1]
    assert torch.equal(pictures.images[2], torch.from_numpy(colours(3)[0]).permute(2, 0, 1))
    assert Folder(path=path, size=8, channels=3).load("test") is None


def test_a_folder_with_splits_numbers_its_classes_alike(tmp_path):
    one, two, three = map(png, colours(3))
    path = fill(tmp_path, {"train/2/a.png": one, "train/10/b.png": two, "test/10/c.png": three})
    train, test = (Folder(path=path, size=8, channels=3).load(split) for split in ("train", "test"))
    assert train.classes == test.classes == ("2", "10")
    assert sorted(train.labels.tolist()) == [0, 1] and test.labels.tolist() == [1]


def test_a_folder_without_subfolders_has_no_classes(tmp_path):
    pictures = Folder(path=fill(tmp_path, {"a.png": png(colours(1)[0])}), size=8, channels=3).load()
    assert pictures.labels is None and pictures.classes == ()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_metadata_file_gives_labels_and_captions(tmp_path, kind):
    path = fill(tmp_path, {f"{number}.png": png(pixels) for number, pixels in enumerate(colours(3))})
    rows = [dict(file_name=f"{number}.png", label=label, text=f"no. {number}") for number, label in ((2, "b"), (0, "a"))]
    with (tmp_path / f"metadata.{kind}").open("w", newline="", encoding="utf-8") as file:
        if kind == "csv":
            file.write("\N{BYTE ORDER MARK}")  # as Excel writes it
            writer = csv.DictWriter(file, ["file_name", "label", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    pictures = Folder(path=path, size=8, channels=3).load()
    assert pictures.classes == ("a", "b") and pictures.labels.tolist() == [1, 0]
    assert pictures.texts == ("no. 2", "no. 0")
    assert torch.equal(pictures.images[0], torch.from_numpy(colours(3)[2]).permute(2, 0, 1))


@pytest.mark.parametrize("line", ["{}", "not json", '{"file_name": "../a.png"}', '{"file_name": "/etc/a.png"}', "[1]"])
def test_a_wrong_metadata_file_is_named(tmp_path, line):
    path = fill(tmp_path, {"a.png": png(colours(1)[0]), "metadata.jsonl": line.encode()})
    with pytest.raises(DataError, match=r"metadata\.jsonl: "):
        Folder(path=path, size=8, channels=3).load()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [100, 1100])  # decoded here, and by workers
def test_bad_pictures_are_left_out_and_listed(tmp_path, count, workers):
    pixels = colours(count - len(BAD))
    good = {f"{'ab'[number % 2]}/{number:04}.png": png(each) for number, each in enumerate(pixels)}
    path = fill(tmp_path, {**good, **{f"a/0005{name}.png": content for name, content in BAD.items()}})
    pictures = Folder(path=path, size=8, channels=3, max_bad=0.07, workers=workers).load()
    assert torch.equal(pictures.images, torch.from_numpy(np.concatenate([pixels[::2], pixels[1::2]])).permute(0, 3, 1, 2))
    assert pictures.labels.tolist() == [0] * len(pixels[::2]) + [1] * len(pixels[1::2])
    assert sorted(Path(name).stem[4:] for name, _ in pictures.skipped) == sorted(BAD)
    with pytest.raises(DataError, match=rf"^7 of {count} pictures cannot be read, more than dataset.max_bad=0.001") as raised:
        Folder(path=path, size=8, channels=3, max_bad=0.001, workers=workers).load()
    assert raised.value.code == 65 and len(str(raised.value).splitlines()) == 6  # five examples


# -------------------------------------------------------------------------------------------------------------- clear errors


@pytest.mark.parametrize("dataset", [Folder, Hub])
def test_a_path_that_leads_nowhere_is_one_line(dataset, tmp_path):
    with pytest.raises(DataError, match=r"^dataset.path=\S+/nowhere does not exist$"):
        dataset(path=str(tmp_path / "nowhere"), size=8, channels=3).load()
    (tmp_path / "file.txt").touch()
    with pytest.raises(DataError, match=r"^dataset.path=\S+: there is no [^\n]+$"):
        dataset(path=str(tmp_path), size=8, channels=3).load()


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    fill(tmp_path, {"train-0.parquet": b"PAR1 and no more"})
    with pytest.raises(DataError, match=r"^dataset.path=[^\n]+ cannot be read as a data set: [^\n]+$"):
        Hub(path=str(tmp_path), size=8, channels=3).load()


def test_parquet_files_of_different_sets_are_one_line(tmp_path):
    import datasets

    for name in ("a", "b"):
        datasets.Dataset.from_dict({name: [1]}).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"^dataset.path=[^\n]+ cannot be read as a data set: [^\n]+$"):
        Hub(path=str(tmp_path), size=8, channels=3).load()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00003.parquet", "train"),
        ("plain_text/test-00000-of-00001.parquet", "test"),
        ("default/test/0000.parquet", "test"),
        ("validation.parquet", "test"),
        ("testimony.parquet", "train"),
        ("anything.parquet", "train"),
    ],
)
def test_the_name_of_a_file_says_its_split(tmp_path, name, split):
    import datasets

    cells = [dict(bytes=png(colours(1)[0]), path=None)]
    table = datasets.Dataset.from_dict(dict(image=cells), datasets.Features(image=datasets.Image()))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(tmp_path / name)
    hub = Hub(path=str(tmp_path), size=8, channels=3)
    assert {split: hub.read(split) is not None for split in ("train", "test")} == {
        "train": split == "train",
        "test": split == "test",
    }


@pytest.mark.parametrize(
    ("values", "names", "labels", "classes"),
    [
        ([2, 0, 2], None, [2, 0, 2], ("0", "1", "2")),  # numbers without names
        (["b", "a", "b"], None, [1, 0, 1], ("a", "b")),
        ([1, 0, 1], ["x", "y"], [1, 0, 1], ("x", "y")),
        ([-1, -1, -1], ["x", "y"], None, ("x", "y")),  # withheld
    ],
)
def test_labels_of_any_type_become_numbers(tmp_path, values, names, labels, classes):
    import datasets

    table = datasets.Dataset.from_dict(dict(image=[dict(bytes=png(each), path=None) for each in colours(3)], kind=values))
    table = table.cast_column("image", datasets.Image())
    if names is not None:
        table = table.cast_column("kind", datasets.ClassLabel(names=names))
    table.to_parquet(tmp_path / "train.parquet")
    pictures = Hub(path=str(tmp_path), size=8, channels=3, label="kind").load()
    assert pictures.classes == classes
    assert (None if pictures.labels is None else pictures.labels.tolist()) == labels


def test_an_unknown_split_is_one_line(tmp_path):
    path = fill(tmp_path, {"a.png": png(colours(1)[0])})
    with pytest.raises(DataError, match=r"no split 'extra'"):
        Folder(path=path, size=8, channels=3, split="extra").load()


def run_hub(tmp_path, endpoint, code):
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True, cwd=REPO)
    return done.stdout, done.stderr


class OneSet(BaseHTTPRequestHandler):
    """The part of the hub's interface that a set me/set with one parquet file needs."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def answer(self):
        path, commit = self.path.split("?")[0], "a" * 40
        self.asked.append(path)
        entries = [
            dict(type="file", path=name, size=len(content), oid=hashlib.sha1(content).hexdigest())
            for name, content in self.files.items()
        ]
        if path in ("/api/datasets/me/set", f"/api/datasets/me/set/revision/{commit}"):
            return self.send(
                200, dict(id="me/set", sha=commit, tags=[], siblings=[dict(rfilename=name) for name in self.files])
            )
        if path == f"/api/datasets/me/set/tree/{commit}":
            return self.send(200, entries)
        name = path.split(f"/resolve/{commit}/")[-1]
        if name in self.files:
            etag = hashlib.sha1(self.files[name]).hexdigest()
            return self.send(200, self.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        return self.send(404, {}, {"X-Error-Code": "EntryNotFound" if "/me/set" in path else "RepoNotFound"})

    def send(self, code, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *args):
        pass


def test_a_set_of_the_hub_is_read_like_its_local_copy_and_then_from_the_cache(tmp_path):
    import datasets

    rows = dict(picture=[png(pixels) for pixels in colours(4)], kind=[1, 0, 1, 1])
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b"]))
    table = datasets.Dataset.from_dict(dict(rows, picture=[dict(bytes=each, path=None) for each in rows["picture"]]), features)
    table.to_parquet(tmp_path / "copy" / "test-0.parquet")
    table.to_parquet(tmp_path / "copy" / "train-0.parquet")
    OneSet.files = {file.name: file.read_bytes() for file in sorted((tmp_path / "copy").glob("*.parquet"))}
    code = """
from diffusion_cli.data import Hub
from diffusion_cli.errors import DataError
print(*(Hub(repo="me/set", size=8, channels=3).load(split).fingerprint for split in ("train", "test")))
try:
    Hub(repo="me/other", size=8, channels=3).load()
except DataError as error:
    print(error)
"""
    local = [Hub(path=str(tmp_path / "copy"), size=8, channels=3).load(split).fingerprint for split in ("train", "test")]
    with ThreadingHTTPServer(("127.0.0.1", 0), OneSet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        fresh, _ = run_hub(tmp_path / "home", endpoint, code)
        OneSet.asked.clear()
        again, _ = run_hub(tmp_path / "home", endpoint, code)
        server.shutdown()
    assert fresh.splitlines()[0].split() == local
    assert fresh.splitlines()[1].startswith("the hub has no data set 'me/other' that you may read")
    assert again == fresh
    assert not [path for path in OneSet.asked if "me/set" in path]  # from the cache: the hub was not asked


def test_no_network_is_one_line(tmp_path):
    code = """
from diffusion_cli.data import Hub
from diffusion_cli.errors import DataError
try:
    Hub(repo="uoft-cs/cifar10", size=32, channels=3).load()
except DataError as error:
    print(error)
"""
    out, err = run_hub(tmp_path, "http://127.0.0.1:9", code)  # port 9: nobody listens
    assert out.startswith("cannot reach the hub for 'uoft-cs/cifar10'") and len(out.splitlines()) == 1
    assert "dataset.path=DIR" in out and "dataset=digits" in out
    assert err == ""  # no noise of retries


# ------------------------------------------------------------------------------------------------------------------- batches


def small(count=10, labels=True):
    images = torch.from_numpy(colours(count)).permute(0, 3, 1, 2).contiguous()
    return Pictures(images, torch.arange(count) % 3 if labels else None, ("a", "b", "c") if labels else ())


def test_a_batch_holds_its_pictures():
    pictures = small()
    for batch in first(Batches(pictures, Pace(4), seed=0), 5):
        assert batch.x.dtype == torch.float32 and batch.x.shape == (4, 3, 8, 8)
        assert torch.equal(batch.x, to_float(pictures.images[batch.ids]))
        assert torch.equal(batch.label, pictures.labels[batch.ids])
    assert first(Batches(small(labels=False), Pace(4), seed=0), 1)[0].label is None


@pytest.mark.parametrize("size", [4, 10, 25])  # within an epoch, exactly one, two and a half
def test_each_epoch_visits_each_picture_once(size):
    batches = first(Batches(small(), Pace(size), seed=3), 50)
    visits = torch.cat([batch.ids for batch in batches])
    epochs = visits[: len(visits) // 10 * 10].view(-1, 10)
    assert (epochs.sort(dim=1).values == torch.arange(10)).all()
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat([batch.ids for batch in first(Batches(small(), Pace(size), seed=4), 5)])[:10])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_starting_at_a_step_continues_the_run_exactly(step):
    batches = Batches(small(), Pace(4), seed=1, flip=True)
    through = first(batches, step + 3)[step:]
    assert all(map(same, through, first(batches, 3, start=step)))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_batches_are_the_ones_in_memory(workers):
    pictures = small()
    from_disk = Pictures(streamed(workers=workers), pictures.labels, pictures.classes)
    for start in (0, 5):
        expected = first(Batches(pictures, Pace(4), seed=1, flip=True), 6, start)
        assert all(map(same, expected, first(Batches(from_disk, Pace(4), seed=1, flip=True), 6, start)))


def test_processes_share_a_batch():
    whole = first(Batches(small(), Pace(4), seed=1, flip=True), 3)
    parts = [first(Batches(small(), Pace(4), seed=1, flip=True, rank=rank, world=2), 3) for rank in (0, 1)]
    for expected, one, two in zip(whole, *parts, strict=True):
        assert torch.equal(expected.x, torch.cat([one.x, two.x])) and torch.equal(expected.ids, torch.cat([one.ids, two.ids]))
    with pytest.raises(ValueError, match="5 pictures cannot be shared equally by 2"):
        Batches(small(), Pace(5), seed=1, world=2)


def test_half_of_the_pictures_are_flipped_left_to_right():
    pictures = small()
    flipped = 0
    for batch in first(Batches(pictures, Pace(100), seed=0, flip=True), 20):
        x = to_float(pictures.images[batch.ids])
        as_is, mirrored = ((batch.x == y).flatten(1).all(1) for y in (x, x.flip(-1)))
        assert (as_is ^ mirrored).all()
        flipped += mirrored.sum().item()
    assert abs(flipped - 1000) < 4 * 500**0.5  # four standard deviations of a fair coin thrown 2,000 times


class Damaged(Arrays):
    """Pictures 3 and 4 cannot be read."""

    def read(self, rows):
        return [b"" if row in (3, 4) else self.pixels[row] for row in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_in_the_stream_gives_its_place_to_the_next(workers):
    pictures = small()
    source = Damaged(colours())
    batches = Batches(Pictures(streamed(workers=workers, max_bad=0.2, source=source), pictures.labels), Pace(5), seed=0)
    intact = Batches(pictures, Pace(5), seed=0)
    for batch, expected in zip(first(batches, 6), first(intact, 6), strict=True):
        ids = torch.where((expected.ids == 3) | (expected.ids == 4), 5, expected.ids)
        assert torch.equal(batch.ids, ids) and torch.equal(batch.label, pictures.labels[ids])
        assert torch.equal(batch.x, to_float(pictures.images[ids]))
    assert sorted(batches.skipped) == ["row 3", "row 4"]
    with pytest.raises(DataError, match=r"2 of 10 pictures cannot be read, more than dataset.max_bad=0.1"):
        first(Batches(Pictures(streamed(workers=workers, max_bad=0.1, source=source)), Pace(5), seed=0), 6)


class Deadly(Arrays):
    """Reading kills the process that reads."""

    def read(self, rows):
        os._exit(9)


def test_a_dead_worker_is_one_line():
    with pytest.raises(DataError, match=r"a process that decodes pictures died.*dataset.workers=") as raised:
        first(Batches(Pictures(streamed(workers=1, source=Deadly(colours()))), Pace(5), seed=0), 1)
    assert "\n" not in str(raised.value)


class Mortal(Arrays):
    """The first process that reads picture 7 is killed by it."""

    def __init__(self, pixels, folder):
        super().__init__(pixels)
        object.__setattr__(self, "folder", folder)

    def read(self, rows):
        if 7 in rows and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(rows)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_is_replaced_at_the_same_position(workers, tmp_path, capfd, monkeypatch):
    """One that dies while it is waited for, and then all of them, one time after the other, while something else is done."""
    monkeypatch.setattr(streaming, "available_cores", lambda: workers)
    batches = Batches(
        Pictures(streamed(workers=workers, source=Mortal(colours(), tmp_path))), Pace(4), seed=1, flip=True
    ).starting_at(0)
    before = signal.getsignal(signal.SIGCHLD)
    for number, expected in enumerate(first(Batches(small(labels=False), Pace(4), seed=1, flip=True), 12)):
        assert same(next(batches), expected)
        assert signal.getsignal(signal.SIGCHLD) is before, "a death ends nothing but a wait for pictures"
        if number in (5, 6, 9):
            for child in multiprocessing.active_children():
                child.kill()
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / "died").exists()
    assert capfd.readouterr().err.count("another goes on in its place") == 4


def test_an_error_ends_the_program_and_its_workers():
    """Its traceback keeps the batches alive to the end of the interpreter, which waits for processes that it started."""
    program = """
import numpy
from diffusion_cli.data.pictures import Arrays, Streamed
from diffusion_cli.data.streaming import decoded
pictures = Streamed(Arrays(numpy.zeros((9, 8, 8), numpy.uint8)), numpy.arange(9), 8, 1, "squeeze", 1, 0)
batches = decoded(pictures, iter([[1], [2], [3], [4], [5]]))
next(batches)
raise ValueError("a bug")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.strip().endswith("ValueError: a bug")


class Signalled(Arrays):
    """Sends the process that reads what Ctrl-C and Slurm send to all of a run."""

    def read(self, rows):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return super().read(rows)


def test_workers_leave_signals_to_the_run():
    batches = Batches(Pictures(streamed(workers=2, source=Signalled(colours()))), Pace(4), seed=1)
    assert all(map(same, first(batches, 6), first(Batches(small(labels=False), Pace(4), seed=1), 6)))


def test_a_set_over_the_memory_limit_is_streamed():
    held, on_disk = (Digits(size=8, channels=1, memory=memory, workers=0).load() for memory in (2, 0))
    assert isinstance(on_disk.images, Streamed) and on_disk.images.shape == tuple(held.images.shape)
    assert same(first(Batches(held, Pace(8), seed=0), 1)[0], first(Batches(on_disk, Pace(8), seed=0), 1)[0])


def test_the_fingerprint_sees_one_pixel_and_one_label():
    pictures = small()
    other, relabelled = pictures.images.clone(), pictures.labels.clone()
    other[9, 2, 7, 7] ^= 1
    relabelled[9] ^= 1
    found = {
        pictures.fingerprint,
        Pictures(other, pictures.labels, pictures.classes).fingerprint,
        Pictures(pictures.images, relabelled, pictures.classes).fingerprint,
    }
    assert len(found) == 3 and small().fingerprint == pictures.fingerprint
