"""Hostile pictures, data sets, folders of runs, YAML and names."""

import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_parts import EVALUATE, EVIL, IGNORED, PICKLES, REFUSED, SAMPLE, SEEN, TINY, Case, Payload, _encoded, a_run, told

# -- pictures and data sets --------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *more: bytes, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((width + 1) * height, 2**20)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(more) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(../outside/owned) (w) file closefile\nshowpage\n"
PICTURES: dict[str, Callable[[], bytes]] = {
    "png of 20000 x 20000": lambda: _encoded("PNG", 20_000, 20_000),
    "png that says 2^31": lambda: _png(2**31 - 1, 2**31 - 1),
    "png text bomb": lambda: _png(8, 8, *[_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24)))] * 20),
    "png profile bomb": lambda: _png(8, 8, _chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**28)))),
    "png chunk of 2^31": lambda: _png(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt",
    "webp of 16383 x 16383": lambda: _encoded("WEBP", 8, 8)[:24] + b"\xfe\x3f\xfe\x3f" + bytes(64),
    "webp of 16000 x 16000": lambda: _encoded("WEBP", 16_000, 16_000),
    "gif of 65535 x 65535": lambda: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
    "gif of 10^4 frames": lambda: _encoded("GIF", 64, 64) * 10_000,
    "bmp of 2^31": lambda: b"BM" + struct.pack("<IHHIIiiHH", 60, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24) + bytes(30),
    "jpeg of 65535 x 65535": lambda: _encoded("JPEG", 8, 8).replace(b"\0\x08\0\x08\x01", b"\xff\xff\xff\xff\x01"),
    "eps": lambda: EPS,
    "pdf": lambda: b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "tiff": lambda: b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\x01\0\0\0\xff\xff\xff\x7f",
    "fli": lambda: b"\x80\0\0\0\x11\xaf" + b"\xff" * 122,
    "psd": lambda: b"8BPS\0\x01" + b"\xff" * 64,
    "icns": lambda: b"icns\xff\xff\xff\xff" + b"ic10\0\0\0\0" * 8,
    "pickle": lambda: pickle.dumps(Payload()),
    "zip": lambda: PICKLES["zip slip"],
    "numpy": lambda: PICKLES["numpy"],
    "html": lambda: EVIL.encode(),
    "empty": lambda: b"",
}  # fmt: skip


def pictures() -> Iterator[Case]:
    for name, data in PICTURES.items():
        given = lambda here, data=data: (a_run(here), (here / "given.png").write_bytes(data()))  # noqa: E731
        codes = IGNORED if name in ("png text bomb", "png profile bomb", "gif of 10^4 frames") else REFUSED
        yield Case(f"init={name}", told(given, [*SAMPLE, "init=given.png", "sampler.steps=2"]), codes)
        yield Case(f"in a folder: {name}", told(lambda here, d=data: _folder(here, d()), [*SEEN, "dataset=folder",
            "dataset.path=pictures", "dataset.size=8", "dataset.channels=1", "dataset.max_bad=0"]), IGNORED)  # fmt: skip
        yield Case(f"in a report: {name}", told(lambda here, d=data: _reported(here, d()), ["report", "runs=[mine]"]), (0,))


def _folder(here: Path, data: bytes, metadata: bytes | None = None, kind: str = "jsonl") -> None:
    (here / "pictures").mkdir()
    for k in range(4):
        (here / "pictures" / f"{k}.png").write_bytes(_encoded("PNG", 8, 8))
    if data:
        (here / "pictures" / "bad.png").write_bytes(data)
    if metadata is not None:
        (here / "pictures" / f"metadata.{kind}").write_bytes(metadata)


def datasets() -> Iterator[Case]:
    words = [*SEEN, "dataset=folder", "dataset.path=pictures", "dataset.size=8", "dataset.channels=1"]
    for name, text in {
        "up": '{"file_name": "../../outside/secret.png"}',
        "absolute": '{"file_name": "/etc/passwd"}',
        "a node": '{"file_name": {"_target_": "os.system"}}',
        "a list": '["0.png"]',
        "deep": '{"file_name": "0.png", "x": ' + "[" * 100_000,
        "NUL": '{"file_name": "0.png\\u0000.txt"}',
        "yaml": "!!python/object/apply:os.system [touch owned]",
        "long": json.dumps({"file_name": "x" * 10**6}),
    }.items():
        yield Case(f"metadata.jsonl {name}", told(lambda here, t=text: _folder(here, b"", t.encode()), words))
    for name, text in {
        "up": "file_name\n../../outside/secret.png\n",
        "formula": "file_name\n=cmd|'/c calc'!A1\n",
        "NUL": "file_name\n\0\n",
        "field of 1 MB": "file_name\n" + "x" * 10**6,
        "other columns": "_target_\nos.system\n",
    }.items():
        yield Case(f"metadata.csv {name}", told(lambda here, t=text: _folder(here, b"", t.encode(), "csv"), words))
    table = [*SEEN, "dataset=parquet", "dataset.path=set.parquet", "dataset.size=8", "dataset.channels=1"]
    for name, made in {
        "pickle": lambda here: (here / "set.parquet").write_bytes(pickle.dumps(Payload())),
        "cut": lambda here: (here / "set.parquet").write_bytes(b"PAR1" + b"\xff" * 64 + b"PAR1"),
        "paths": lambda here: _parquet(
            here, [{"bytes": None, "path": "/dev/zero"}, {"bytes": None, "path": "../outside/secret.png"}]
        ),
        "bombs": lambda here: _parquet(here, [{"bytes": PICTURES["png that says 2^31"](), "path": None}] * 3),
        "a script": lambda here: (
            (here / "set.parquet").mkdir(),
            (here / "set.parquet/set.parquet.py").write_text("open('../outside/owned','w')"),
        ),
    }.items():
        yield Case(f"parquet {name}", told(made, table))
    yield Case("parquet of 1 GB in 1 MB", told(_swollen, table), IGNORED, 1200)  # docs/security.md says so
    yield Case(
        "prompts of no text",
        told(lambda here: (a_run(here), (here / "p").write_bytes(PICKLES["pickle"])), [*SAMPLE, "prompts=p"]),
    )
    yield Case("prompts away", told(a_run, [*SAMPLE, "prompts=../outside"]))


def _parquet(here: Path, cells: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    about = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pyarrow.schema([("image", kind)], metadata={"huggingface": json.dumps(about)})
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}, schema=schema), here / "set.parquet")


def _swollen(here: Path) -> None:
    """One picture of 4 MB, 256 times: a dictionary holds it once."""
    _parquet(here, [{"bytes": _encoded("PNG", 8, 8) + bytes(4 * 2**20), "path": None}] * 256)


# -- the folder of a run -----------------------------------------------------------------------------------------------

LAUGH = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def _reported(here: Path, picture: bytes | None = None, **written: bytes) -> Path:
    """A run as diffusion-report reads it."""
    run = here / "mine"
    (run / "samples").mkdir(parents=True)
    (run / "status.json").write_text('{"state": "finished", "step": 1, "pid": 1}')
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    if picture is not None:
        (run / "samples" / "samples_00000001.png").write_bytes(picture)
        (run / "growth.gif").write_bytes(picture)
    for name, data in written.items():
        (run / name.replace("__", ".")).write_bytes(data)
    return run


def reports() -> Iterator[Case]:
    words = ["report", "runs=[mine]"]
    whole = {
        "laughs": {"config__yaml": LAUGH.encode()},
        "python": {"config__yaml": b"a: !!python/object/apply:os.system ['touch ../outside/owned']"},
        "module": {"config__yaml": b"a: !!python/module:antigravity"},
        "deep yaml": {"config__yaml": b"[" * 50_000 + b"]" * 50_000},
        "large yaml": {"config__yaml": b"a: " + b"x" * 6_000_000},
        "merge": {"config__yaml": b"a: &a {b: 1}\n<<: *a\n"},
        "recursive": {"config__yaml": b"a: &a [*a]\n"},
        "interpolation": {"config__yaml": b"a: ${oc.env:HOME}\n"},
        "markup": {
            "status__json": json.dumps(
                {"state": EVIL, "step": EVIL, "reason": EVIL, "pid": EVIL, "figures": {EVIL: EVIL}}
            ).encode()
        },
        "status a list": {"status__json": b"[1]"},
        "status of nodes": {
            "status__json": b'{"state": {"a": 1}, "step": [1], "pid": -1, "total": {}, "figures": 3, "time": 7}'
        },
        "deep status": {"status__json": b"[" * 100_000},
        "digits": {"status__json": b'{"step": ' + b"9" * 10_000 + b"}"},
        "figures": {"metrics__jsonl": json.dumps({"step": 1, EVIL: 1, "b": "x", "c": {"d": 1}}).encode() + b"\n[1]\nx\n"},
        "endless figures": {"metrics__jsonl": b'{"step": 1, "a": 1e999, "b": NaN, "c": -Infinity}\n' * 1000},
        "5,000 names": {"metrics__jsonl": json.dumps({"step": 1, **{f"t{k}": 1 for k in range(5_000)}}).encode() + b"\n"},
        "one long line": {"metrics__jsonl": b"[" * 10_000_000},
        "steps": {"metrics__jsonl": b'{"step": -1}\n{"step": true}\n{"step": 1e300}\n{"step": "x", "a": 1}\n'},
        "sweep": {"sweep__json": json.dumps({"swept": [EVIL, {}, 3], "metric": EVIL, "direction": EVIL, "runs": 3}).encode()},
    }
    for name, written in whole.items():
        yield Case(f"report {name}", told(lambda here, w=written: _reported(here, **w), words), (0,))
    for link in ("config.yaml", "status.json", "metrics.jsonl", "samples/samples_00000001.png", "growth.gif", "report.html"):
        yield Case(f"report with {link} a link", lambda here, link=link: _linked(here, link), IGNORED)


def _linked(here: Path, link: str) -> list[str]:
    run = _reported(here)
    target = {".png": "secret.png", ".gif": "secret.png"}.get(Path(link).suffix, "secret.json")
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(here.parent / "outside" / target)
    return ["report", "runs=[mine]"]


INSIDE = ("checkpoints", "samples", "tensorboard", "generated", "parts", "evaluated", "exported")
INSIDE_FILES = ("metrics.jsonl", "status.json", "config.yaml", "loss.png", ".lock", ".status.json.tmp", ".metrics.jsonl.tmp")


def runs() -> Iterator[Case]:
    train = [*TINY[:1], "name=mine", "outputs=.", *TINY[2:]]
    for name in INSIDE:
        words = {"generated": SAMPLE, "evaluated": EVALUATE, "exported": ["export", "ckpt=run"]}.get(name, train)
        yield Case(f"{name} a link out of the run", lambda here, n=name, w=words: _led_out(here, n, w), IGNORED)
    for name in INSIDE_FILES:
        yield Case(f"{name} a link out of the run", lambda here, n=name: _led_out(here, n, train, "secret.json"), IGNORED)
    for name, text in {
        "nothing of ours": '{"a": 1}\n{"step": "x"}\n[1]\n{"step": 1, "b": "c"}\n',
        "deep": "[" * 100_000,
        "NaN": '{"step": NaN, "train/loss": NaN}\n{"step": 1, "train/loss": "x"}\n',
    }.items():
        yield Case(f"metrics.jsonl {name}", told(lambda here, t=text: _begun(here, "metrics.jsonl", t), train), IGNORED)
    for name, text in {
        "of others": '{"state": "finished", "step": "x", "figures": 3}',
        "deep": "[" * 100_000,
        "pid": '{"state": "running", "pid": -1, "step": -5}',
    }.items():
        yield Case(f"status.json {name}", told(lambda here, t=text: _begun(here, "status.json", t), train), IGNORED)


def _begun(here: Path, name: str, text: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / name).write_text(text)


def _led_out(here: Path, name: str, words: list[str], target: str = "") -> list[str]:
    run = here / ("mine" if words[0] == "train" else "run")
    if words[0] != "train":
        a_run(here)
    run.mkdir(exist_ok=True)
    (run / name).symlink_to(here.parent / "outside" / target)
    return words


# -- configs and names -------------------------------------------------------------------------------------------------


def configs() -> Iterator[Case]:
    for name, text in {
        "laughs": f"# x\n{LAUGH}",
        "laughs in a value": f"# x\ntrust: &t [x]\n{LAUGH}",
        "python": "trust: !!python/object/apply:os.system ['touch ../outside/owned']\n",
        "deep": "trust: " + "[" * 20_000,
        "recursive": "trust: &a [*a]\n",
        "a target": "model:\n  _target_: os.system\n  command: touch ../outside/owned\n",
        "defaults that lead away": "defaults: [../../../outside/secret]\n",
        "defaults of itself": "defaults: [hostile]\n",
        "no YAML": EVIL,
        "NUL": "trust: \0",
    }.items():
        yield Case(
            f"--config-dir {name}",
            told(lambda here, t=text: _config(here, t), [*TINY, "main", "--config-dir", "dir", "experiment=hostile"]),
        )
    for word in (
        "name=../../outside/owned", "name=/tmp/owned", "name=..", "name=a/../../outside/owned", "name=.ssh/x", "name=a\nb",
        "name=${oc.env:HOME}", "name=~root/x",
        "experiment=../../../outside/secret", "model=../../x", "model._target_=os.system",
        "hydra.callbacks={a:{_target_:os.system,command:'touch ../outside/owned'}}",
        "hydra.job_logging={root:{handlers:[a]},handlers:{a:{class:logging.FileHandler,filename:../outside/owned}},version:1}",
        "hydra.launcher._target_=os.system", "hydra.sweeper._target_=os.system", "hydra.searchpath=[pkg://os]",
    ):  # fmt: skip
        yield Case(
            word[:60],
            told(lambda here: None, [*TINY[:1], "main", *TINY[2:], word]),
            IGNORED if word.startswith("hydra") else REFUSED,
        )


def _config(here: Path, text: str) -> None:
    (here / "dir" / "experiment").mkdir(parents=True)
    (here / "dir" / "experiment" / "hostile.yaml").write_text("# @package _global_\n" + text)
