"""diffusion-report reads what there is, keeps what matters of it, and lets no word of a run act on the page."""

import base64
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import STEPS, make_generated, make_run
from PIL import Image

from diffusion_cli import config
from diffusion_cli.commands import report
from diffusion_cli.errors import ConfigError
from diffusion_cli.report import page, pictures, reading
from diffusion_cli.report.making import make
from diffusion_cli.report.thinning import evenly, thinned
from diffusion_cli.settings import Report

REPO = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """The elements of a page and the text of its scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self.scripts += [""] * (tag == "script")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def written(*folders: Path, out: Path | None = None) -> Page:
    return Page(make(Report(tuple(map(str, folders)), str(out) if out else None)))


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    make_generated(make_run(tmp_path / "mine"))
    shown = written(tmp_path / "mine").data
    (run,) = shown["runs"]
    assert (tmp_path / "mine/report.html").is_file()
    assert (run["name"], run["state"], run["step"], run["problems"]) == ("mine", "finished", 300, [])
    assert run["curves"]["train/loss"] == {"steps": list(STEPS), "values": [1, 0.5, 0.33333]}
    assert [still["step"] for still in run["previews"]["samples"]] == list(STEPS) and set(run["previews"]) == {
        "samples",
        "steps",
    }
    assert run["config"]["schedule._target_"] == "flow" and "_target_: diffusion_cli.schedules.Flow" in run["yaml"]
    assert run["evaluated"][0]["figures"]["bits"] == {"value": 3.25, "error": 0.01, "of": "standard error over 8 pictures"}
    assert run["generated"][0]["facts"] == {"seed": 7, "n": 4} and run["generated"][0]["picture"]["width"] == 30
    figures = dict(zip([column["key"] for column in shown["columns"]], run["cells"]))
    assert figures == {"train/loss": 0.33333, "evaluate/x0_mse": 0.1, "fid": 12.5, "bits": 3.25}


def test_columns_are_what_runs_differ_in(tmp_path: Path) -> None:
    for i, (lr, schedule) in enumerate([(0.1, "Flow"), (0.01, "Flow"), (0.1, "Edm")]):
        make_run(tmp_path / "sweep" / f"job_{i}", i, lr=lr, schedule=schedule)
    (tmp_path / "sweep/sweep.json").write_text('{"swept": ["optimizer.lr"], "metric": "train/loss", "direction": "maximize"}')
    data = written(tmp_path / "sweep").data
    assert [(column["key"], column["better"]) for column in data["columns"]] == [
        ("optimizer.lr", 0), ("schedule._target_", 0), ("train/loss", 1), ("evaluate/x0_mse", -1),
    ]  # fmt: skip
    assert [run["cells"][:2] for run in data["runs"]] == [[0.1, "flow"], [0.01, "flow"], [0.1, "edm"]]
    assert data["metric"] == "train/loss" and data["title"] == "sweep" and data["runs"][1]["name"] == "job_1"


def test_a_short_float_is_a_number(tmp_path: Path) -> None:
    for i, lr in enumerate(("1e-4", "0.01", "auto")):
        run = make_run(tmp_path / "sweep" / f"job_{i}")
        (run / "config.yaml").write_text(f"optimizer:\n  lr: {lr}\n")
    assert [run["cells"][0] for run in written(tmp_path / "sweep").data["runs"]] == [0.0001, 0.01, "auto"]


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    for name in ("a", "sweep/one", "sweep/two"):
        make_run(tmp_path / "outputs" / name)
    names = [path.name for path in reading.find([str(tmp_path / "outputs"), str(tmp_path / "outputs/a")])]
    assert names == ["a", "one", "two"]
    data = written(tmp_path / "outputs/a", tmp_path / "outputs/sweep/two", out=tmp_path / "both.html").data
    assert [run["name"] for run in data["runs"]] == ["a", "sweep/two"]


DAMAGED = [  # file, its bytes, what the page says of it
    ("status.json", b'{"state": "fin', "status.json: cannot be read"),
    ("status.json", b"[" * 100_000, "status.json: cannot be read"),
    ("config.yaml", b"a: [1, 2", "config.yaml: cannot be read"),
    ("config.yaml", b"a: &x [1]\nb: *x\n", "config.yaml: cannot be read (it has aliases)"),
    ("config.yaml", b"\xff\xfe\x00", "config.yaml: cannot be read"),
    ("metrics.jsonl", b'{"step": 1, "a": 1}\nxyz\n{"step": 2, "a": 2}\n', "metrics.jsonl: 1 line cannot be read"),
    ("metrics.jsonl", b'{"step": 1, "train/loss": NaN}\n', "train/loss: not finite at step 1"),
    ("metrics.jsonl", b'{"step": 7, "train/loss": 1' + 400 * b"0" + b"}\n", "train/loss: not finite at step 7"),
    ("samples/samples_00000100.png", b"not a picture", "samples/samples_00000100.png: cannot be read"),
    ("samples/samples_00000100.png", b"", "samples/samples_00000100.png: cannot be read"),
    ("evaluated/old.json", b'{"figures": {"fid": {"mean": 1}}}', "evaluated/old.json: not figures with a value each"),
    ("generated/x/metadata.json", b"{", "metadata.json: cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "content", "line"), DAMAGED)
def test_a_damaged_file_is_a_line(file: str, content: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "mine")
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_bytes(content)
    (found,) = written(run).data["runs"]
    assert len(found["problems"]) == 1 and found["problems"][0].startswith(line), found["problems"]
    assert line in capsys.readouterr().out


def test_a_last_line_that_is_still_being_written_is_no_problem(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 400, "train/lo')
    (found,) = written(run).data["runs"]
    assert not found["problems"] and found["curves"]["train/loss"]["steps"] == list(STEPS)


def test_a_run_that_failed_before_it_began_has_its_reason(tmp_path: Path) -> None:
    (tmp_path / "sweep/bad").mkdir(parents=True)
    (tmp_path / "sweep/bad/status.json").write_text('{"state": "failed", "step": 0, "reason": "no such data"}')
    make_run(tmp_path / "sweep/good")
    bad, good = written(tmp_path / "sweep").data["runs"]
    assert (bad["state"], bad["reason"], bad["problems"], good["reason"]) == ("failed", "no such data", [], "")


def test_frames_of_the_animation_stand_in_for_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    for path in (run / "samples").glob("samples_*"):
        path.unlink()
    frames = [Image.new("L", (20, 20), grey) for grey in (0, 120, 250)]
    frames[0].save(run / "growth.gif", save_all=True, append_images=frames[1:])
    stills = written(run).data["runs"][0]["previews"]["samples"]
    greys = [decoded(still["src"]).getpixel((9, 9))[0] for still in stills]
    assert [still["step"] for still in stills] == [None] * 3 and greys == [0, 120, 250]


def decoded(src: str) -> Image.Image:
    kind, _, data = src.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


# -- nothing that a run says acts ----------------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&amp;'\"{{ 7 * 7 }}"


def test_no_word_of_a_run_becomes_markup(tmp_path: Path) -> None:
    harmless = written(make_run(tmp_path / "mine"))
    name = EVIL.replace("/", "")
    evil = make_run(tmp_path / name, reason=EVIL, state="failed", **{EVIL: EVIL})
    (evil / "config.yaml").write_text(json.dumps({EVIL: {EVIL: EVIL}, "schedule": {"_target_": EVIL}}))
    with (evil / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, EVIL: 1.0}) + "\n")
    (evil / "evaluated").mkdir()
    (evil / "evaluated" / f"{name}.json").write_text(
        json.dumps({"figures": {EVIL: {"value": 1, "of": EVIL}}, "made_by": {EVIL: EVIL}})
    )
    found = written(evil)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    (run,) = found.data["runs"]
    assert run["name"] == name and run["reason"] == EVIL and run["evaluated"][0]["made"] == {EVIL: EVIL}
    assert "49" not in found.data["title"]


def test_the_policy_allows_what_is_there_and_no_network(tmp_path: Path) -> None:
    found = written(make_run(tmp_path / "mine"))
    policy = next(attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    directives = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert directives["default-src"] == "'none'" and directives["img-src"] == "data:"
    assert "unsafe" not in str(policy) and "http" not in str(policy) and "*" not in str(policy)
    assert directives["script-src"].split() == [page._sum(text) for text in found.scripts[1:]]
    links = [attrs.get(name) for _, attrs in found.tags for name in ("src", "href") if name in attrs]
    assert links == ["data:,", "#main"]


def test_echarts_is_the_published_file() -> None:
    folder = REPO / "diffusion_cli/report"
    library = (folder / "echarts.min.js").read_text(encoding="utf-8")
    said = re.search(r"SHA-256 ([0-9a-f]{64})", (folder / "echarts.LICENSE.txt").read_text())
    assert said and page._sum(library) == f"'sha256-{base64.b64encode(bytes.fromhex(said[1])).decode()}'"
    assert "</script" not in library, "it would end its element"
    assert not any("</" in (folder / name).read_text() for name in page.SCRIPTS)


def test_deep_and_strange_json_is_cut_not_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    (run / "evaluated").mkdir()
    facts = '{"deep": ' + 300 * '{"a": ' + "NaN" + 300 * "}" + "}"
    (run / "evaluated/x.json").write_text('{"figures": {"fid": {"value": Infinity}}, "made_by": ' + facts + "}")
    (found,) = written(run).data["runs"]
    assert found["evaluated"][0]["figures"]["fid"] == {"value": None} and '"..."' in json.dumps(found["evaluated"])


# -- less of it, and the same to see ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinned_curves_keep_their_ends_and_extremes(values: list[float], most: int) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    kept = thinned(points, most)
    assert len(kept) <= most and set(kept) <= set(points) and kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    for extreme in (min, max):
        assert extreme(value for _, value in kept) == extreme(values)


def test_every_spike_of_a_long_curve_stays() -> None:
    draws = random.Random(0)
    points = [(float(i), draws.random()) for i in range(20_000)]
    for place in (17, 4_321, 19_998):
        points[place] = (float(place), 50.0)
    points[777] = (777.0, math.nan)
    kept = thinned(points, 100)
    assert {17.0, 4_321.0, 19_998.0, 777.0} <= {step for step, value in kept if not value < 50} and len(kept) <= 101


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (100, 7), (6, 1), (1000, 32)])
def test_evenly_has_both_ends(count: int, most: int) -> None:
    places = evenly(count, most)
    assert len(places) == min(count, most) == len(set(places)) and places[-1] == count - 1
    assert most == 1 or places[0] == 0


def test_pictures_keep_to_their_share(tmp_path: Path) -> None:
    noise = Image.effect_noise((700, 500), 120)
    noise.save(tmp_path / "noise.png")
    for count in (1, 50, 1000, 5000):
        allowed = pictures.share(count)
        made = pictures.webp(reading.Still(tmp_path / "noise.png"), allowed)
        assert (
            len(base64.b64decode(made.src.partition(",")[2])) <= allowed.size
            and made.width * made.height <= 1.02 * allowed.pixels
        )
        assert decoded(made.src).size == (made.width, made.height) and made.width / made.height == pytest.approx(1.4, rel=0.1)


def test_a_picture_within_its_share_loses_nothing(tmp_path: Path) -> None:
    Image.effect_noise((64, 48), 120).convert("RGB").save(tmp_path / "noise.png")
    made = pictures.webp(reading.Still(tmp_path / "noise.png"), pictures.share(10))
    assert decoded(made.src).tobytes() == Image.open(tmp_path / "noise.png").tobytes()


def test_a_picture_of_a_bomb_is_not_opened(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(pictures.Unreadable, match=r"pixels are too many|exceeds limit"):
        pictures.webp(reading.Still(tmp_path / "bomb.png"), pictures.share(1))


@pytest.mark.slow
def test_two_hundred_runs_fit(tmp_path: Path) -> None:
    sys.path.insert(0, str(REPO / "scripts"))
    from bench_report import SPIKE
    from bench_report import make_run as make_long_run

    for seed in range(200):
        make_long_run(tmp_path / f"run_{seed:03d}", seed)
    path = make(Report((str(tmp_path),), None))
    assert path.stat().st_size < 20_000_000
    data = Page(path).data
    assert len(data["runs"]) == 200 and not any(run["problems"] for run in data["runs"])
    assert all(max(run["curves"]["train/loss"]["values"]) == SPIKE for run in data["runs"])
    assert all(len(run["previews"]["samples"]) >= 3 for run in data["runs"])


# -- the command -----------------------------------------------------------------------------------------------------------


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from diffusion_cli.commands.report import main; main(); print(*sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )


def test_folders_are_named_as_a_shell_completes_them(tmp_path: Path) -> None:
    for name in ("a", "it's b=2, [x]"):
        make_run(tmp_path / "outputs" / name)
    done = command("outputs/a", "outputs/it's b=2, [x]", "out=both.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs, ") and Page(tmp_path / "both.html").data["title"] == "outputs"
    assert "torch" not in done.stdout.split(), "a page is made without torch"
    assert command("runs=outputs/a", cwd=tmp_path).returncode == 0 and (tmp_path / "outputs/a/report.html").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "diffusion-report: say which runs: diffusion-report outputs/<name>"),
        (("nowhere",), "diffusion-report: nowhere: there is no such folder"),
        (("empty",), "diffusion-report: empty: no run in it or below it"),
        (("empty", "outt=x.html"), "diffusion-report: outt is not a setting: did you mean out?"),
        (("empty", "runs=[a]"), "diffusion-report: empty: folders are named either so or by runs=[...], not both"),
        (("empty", "--out", "x"), "diffusion-report: --out: settings are written key=value"),
        (("empty", "out=[1]"), "diffusion-report: out is [1]"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 64 and done.stderr.startswith(line) and len(done.stderr.splitlines()) == 1, done.stderr


def test_help_shows_the_command(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0 and "diffusion-report outputs/digits" in done.stdout and "out=null" in done.stdout


def test_words_become_settings() -> None:
    assert report.with_runs(["outputs/a", "--cfg", "job", "out=x", "outputs/b"]) == [
        "--cfg",
        "job",
        "out=x",
        "runs=['outputs/a','outputs/b']",
    ]
    assert config.check_report({"runs": ["a", 3], "out": None}) == Report(("a", "3"), None)
    with pytest.raises(ConfigError, match="say which runs"):
        config.check_report({"runs": "???", "out": None})


def test_the_readme_tells_commands_that_exist() -> None:
    said = re.findall(r"^(diffusion-report [^#\n]+)", (REPO / "README.md").read_text(), re.M)
    assert len(said) >= 2
    for line in said:
        words = report.with_runs(line.split()[1:])
        assert {word.partition("=")[0] for word in words} <= {"runs", "out"}, line
