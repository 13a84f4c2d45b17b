"""The scripts: bench.py's arithmetic on invented timings, check_digits.py's eye for junk, and what run.py may import."""

import ast
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffusion_cli.data import Digits
from diffusion_cli.data.pixels import to_float

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


timing = load("timing")  # bench.py imports it by this name
bench, check = load("bench"), load("check_digits")


# ---------------------------------------------------------------------------------------------------------- bench: figures


def samples(*seconds: float, foreign: float | None = 0.0) -> list:
    return [timing.Sample(s, foreign) for s in seconds]


def contestants(amount: float = 1.0, peers_amount: float = 1.0) -> tuple:
    return timing.Contestant("ours", lambda: None, amount), timing.Contestant("peer", lambda: None, peers_amount)


def test_disturbed_samples_are_dropped_only_while_enough_clean_ones_are_left() -> None:
    clean, disturbed = samples(1.0, 2.0, 3.0), samples(50.0, foreign=0.11)
    assert timing.kept([*clean, *disturbed]) == clean
    assert timing.kept([*clean[:2], *disturbed]) == [*clean[:2], *disturbed]
    assert timing.kept(samples(1.0, foreign=None)) == samples(1.0, foreign=None)
    assert timing.Sample(1.0, 0.10).clean
    found = timing.figures([*clean, *disturbed], 6.0, "images/s")
    assert (found["min"], found["median"], found["max"]) == (2.0, 3.0, 6.0)
    assert (found["samples"], found["disturbed"], found["dropped"]) == (4, 1, 1)
    found = timing.figures([*clean[:2], *disturbed], 1.0, "s")
    assert found["median"] == 2.0 and (found["disturbed"], found["dropped"]) == (1, 0)


@pytest.mark.parametrize("unit", ["s", "images/s"])
def test_a_ratio_above_one_is_faster_whatever_the_unit(unit) -> None:
    ours, peer = contestants()
    row = timing.compare("x", unit, ours, peer, {"ours": samples(1.0, 2.0, 4.0), "peer": samples(3.0, 4.0, 6.0)})
    assert row["ratio"] == 2.0  # of the medians, 4 and 2
    assert row["paired"] == 2.0  # the middle one of 3, 2 and 1.5
    assert row["pairs"] == 3


def test_paired_ratios_are_of_the_same_round_and_of_the_same_amount() -> None:
    """A machine that slows down eightfold and work of unlike size: the pairs still say twice as fast."""
    ours, peer = contestants(amount=10, peers_amount=5)
    slower = {"ours": samples(1.0, 2.0, 8.0), "peer": samples(1.0, 2.0, 8.0)}
    row = timing.compare("x", "images/s", ours, peer, slower)
    assert row["paired"] == row["ratio"] == 2.0
    slower["peer"][1] = timing.Sample(2000.0, foreign=1.0)
    slower = {name: [*found, *samples(4.0)] for name, found in slower.items()}
    row = timing.compare("x", "images/s", ours, peer, slower)
    assert row["paired"] == 2.0 and row["pairs"] == 3


def test_cpu_seconds_are_compared_for_the_same_amount_and_only_where_all_are_known() -> None:
    ours, peer = contestants(amount=10, peers_amount=5)
    mine = [timing.Sample(9.0, 0.0, own) for own in (1.0, 2.0, 3.0)]
    theirs = [timing.Sample(1.0, 0.0, own) for own in (1.0, 3.0, 1.5)]
    row = timing.compare("x", "s", ours, peer, {"ours": mine, "peer": theirs})
    assert row["cpu"] == 2.0  # the middle one of 2, 3 and 1
    assert timing.cells(row)[6] == "2.00"
    theirs[0] = timing.Sample(1.0)
    assert timing.compare("x", "s", ours, peer, {"ours": mine, "peer": theirs})["cpu"] is None


def test_contestants_take_turns_in_rotated_order_until_enough_samples_are_clean(monkeypatch) -> None:
    order: list[str] = []
    everyone = [timing.Contestant(name, lambda name=name: order.append(name)) for name in "abc"]
    foreign = iter([1.0] * 6 + [0.0] * 100)  # two rounds are disturbed

    def timed(call):
        call()
        return timing.Sample(1.0, next(foreign))

    monkeypatch.setattr(timing, "timed", timed)
    found = timing.take_turns(everyone, 3, 9)
    assert "".join(order) == "abcbcacababcbca"
    assert {name: sum(s.clean for s in mine) for name, mine in found.items()} == {"a": 3, "b": 3, "c": 3}
    foreign = iter([1.0] * 100)
    assert [len(mine) for mine in timing.take_turns(everyone, 2, 4).values()] == [4, 4, 4]


def test_a_real_call_is_timed_and_its_own_work_is_not_foreign() -> None:
    sample = timing.timed(lambda: sum(range(10)))
    assert sample.seconds > 0
    assert sample.foreign is None or sample.foreign >= 0


def test_the_table_has_every_figure_and_says_what_was_kept() -> None:
    ours, peer = contestants(amount=10, peers_amount=10)
    disturbed = {"ours": samples(1.0, 2.0, 4.0, foreign=0.5), "peer": samples(2.0, 4.0, 8.0)}
    rows = [
        timing.compare("training", "images/s", ours, peer, disturbed),
        {"what": "digits", "unit": "s", "ours": timing.figures(samples(61.25), 1, "s")},
    ]
    head, training, digits = timing.table(rows).splitlines()
    assert all(word in head for word in ("ratio", "paired", "cpu"))
    words = ["training", "images/s", "2.5/5/10", "1.25/2.5/5", "2.00", "2.00", "3 of 3 (kept) + 0 of 3", "peer"]
    assert " ".join(training.split()) == " ".join(words)
    assert " ".join(digits.split()) == "digits s 61.2/61.2/61.2 0 of 1"
    assert timing.number(12345.6) == "12,346"


@pytest.mark.parametrize(
    ("ratio", "paired", "word"),
    [
        (0.8, 0.9, "BEHIND peer"),
        (0.9, 1.1, "level with peer"),
        (1.01, 1.3, "level with peer"),
        (1.2, 1.1, "ahead in every row"),
    ],
)
def test_where_ours_is_behind_is_said(ratio, paired, word) -> None:
    quiet, disturbed = {"disturbed": 2, "dropped": 2}, {"disturbed": 2, "dropped": 0}
    row = {"what": "sampling", "ours": quiet, "peer": quiet, "peer_is": "peer", "ratio": ratio, "paired": paired}
    said = timing.verdicts([row, {"what": "digits", "ours": quiet}])
    assert len(said) == 1 and said[0].startswith(word) and "quiet machine" not in said[0]
    said = timing.verdicts([{**row, "peer": disturbed}])
    assert ("quiet machine" in said[0]) == ("sampling" in said[0])


# --------------------------------------------------------------------------------------------------------- bench: arguments


def test_arguments(tmp_path, capsys) -> None:
    quick, full = bench.arguments(["--quick"]), bench.arguments([])
    assert quick.rounds < full.rounds and quick.seconds < full.seconds and quick.rounds >= timing.ENOUGH
    assert (full.device, full.precision, full.compile, full.compile_peer, full.out) == ("auto", "auto", "auto", False, None)
    assert bench.arguments(["--out", str(tmp_path / "x.json")]).out == tmp_path / "x.json"
    for words, says in [
        (["--out", str(tmp_path / "none" / "x.json")], "there is no folder"),
        (["--only", "unett"], "unet_small"),
        (["--precision", "int4"], "bf16"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            bench.arguments(words)
        assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_bench_needs_no_torch_before_it_measures_how_commands_start() -> None:
    heavy = {"torch", "diffusers", "diffusion_cli", "hydra"}
    tree = ast.parse((SCRIPTS / "bench.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {name.split(".")[0] for node in top for name in names(node)} & heavy


def test_both_networks_of_a_contest_are_the_same() -> None:
    """The config of the contest composes, and diffusers' weights, renamed, give the same answers in our network."""
    from diffusion_cli.devices import choose
    from diffusion_cli.vision import mend_torchvision

    mend_torchvision()
    pytest.importorskip("diffusers")
    work = bench.Workload("unet_small", train=2, sample=2, steps=2)
    pair = bench.Pair(work, choose("cpu", "fp32", False, print), compile_peer=False)
    assert pair.difference < 1e-5
    assert pair.weights == sum(p.numel() for p in pair.theirs.parameters())
    before = [p.clone() for p in pair.network.parameters()]
    pair.our_training(pair.objective)()
    assert any(not torch.equal(a, b) for a, b in zip(before, pair.network.parameters()))
    pair.peers_training()()
    pair.our_sampling(pair.plain)()
    pair.peers_sampling()()


# ------------------------------------------------------------------------------------------------------------- check_digits


@pytest.fixture(scope="module")
def judge() -> torch.nn.Module:
    """A classifier with a third of its training."""
    pictures = Digits(size=8, channels=1).load("train")
    return check.train(pictures.images, pictures.labels, 10, steps=150)


def test_the_classifier_accepts_digits_and_refuses_junk(judge) -> None:
    pictures = Digits(size=8, channels=1).load("test")
    real = to_float(pictures.images)
    digit, sure = check.judged(judge, real)
    assert check.share(digit == pictures.labels) > 0.9
    assert check.share(sure) > 0.7
    torch.manual_seed(1)
    for name, make in check.SHOWN.items():
        if "collage" not in name:  # halves of real digits pass in part, as the script says
            assert check.share(check.judged(judge, make(real))[1]) < 0.05, name


def test_junk_has_the_shape_and_range_of_pictures() -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 1, 9, 9) * 2 - 1
    for make in [*check.SHOWN.values(), *check.TRAINED]:
        junk = make(x)
        assert junk.shape == x.shape and junk.abs().max() <= 1
    assert torch.equal(check.shuffled(x).flatten(1).sort(1).values, x.flatten(1).sort(1).values)


def test_shifting_moves_a_picture_by_a_pixel_at_most() -> None:
    torch.manual_seed(0)
    x = torch.full((64, 2, 8, 8), -1.0)
    x[:, :, 4, 4] = 1.0
    moved = check.shifted(x)
    assert moved.shape == x.shape
    assert (moved == 1).sum((1, 2, 3)).eq(2).all()
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}


def test_the_report_fails_when_a_class_never_appears_or_too_few_are_accepted(judge, capsys) -> None:
    train, test = (Digits(size=8, channels=1, labels=True).load(split) for split in ("train", "test"))
    data = check.Data(train, test, taught=list(range(10)))
    assert check.report(judge, data, test.images, test.labels, aim=0.5)
    assert not check.report(judge, data, test.images, None, aim=1.01)
    only = test.images[test.labels != 3]
    capsys.readouterr()
    passed = check.report(judge, data, only, None, aim=0.5)
    said = capsys.readouterr().out
    assert passed == ("never sampled" not in said)
    noise = (torch.rand(50, 1, 8, 8) * 255).to(torch.uint8)
    assert not check.report(judge, data, noise, None, aim=0.5)
    assert "never sampled: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in capsys.readouterr().out
    assert check.report(judge, check.Data(train, test, taught=[1, 8, 4]), test.images, None, aim=0.5)


# -------------------------------------------------------------------------------------------------------------------- run.py


def names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def test_run_needs_the_standard_library_only() -> None:
    tree = ast.parse((SCRIPTS / "run.py").read_text(encoding="utf-8"))
    found = {
        name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in names(node)
    }
    assert found and found <= sys.stdlib_module_names


# ------------------------------------------------------------------------------------------------------ choices: its table


def test_a_choice_is_judged_by_pairs_of_seeds(tmp_path: Path) -> None:
    """Seeds that differ more from each other than the cases do: only their pairs tell. By hand: logarithms of -0.1, -0.2 and
    -0.3 have a t of 2 sqrt(3) < 4.30; of -0.2, -0.21 and -0.22 it is 21 sqrt(3)."""
    choices = load("choices")
    plain = choices.Case("plain", {"x0_mse": {"0": 0.10, "1": 0.20, "2": 0.40}, "kid": {"0": 1.0, "1": 2.0, "2": 4.0}}, 2.0)
    near = {"1": 0.20 * math.exp(-0.21), "0": 0.10 * math.exp(-0.20), "2": 0.40 * math.exp(-0.22)}
    wide = {"0": math.exp(-0.1), "1": 2 * math.exp(-0.2), "2": 4 * math.exp(-0.3)}
    other = choices.Case("other", {"x0_mse": near, "kid": wide}, 3.0)
    assert other.gain(plain, "x0_mse") == (pytest.approx(1 - math.exp(-0.21)), pytest.approx(0.01), True)
    assert other.gain(plain, "kid") == (pytest.approx(1 - math.exp(-0.2)), pytest.approx(0.1), False)
    rows = choices.page([plain, other]).splitlines()
    assert rows[3] == "| `other` | 3 | 0.1883 ± 0.12 | **+18.9 ± 1.0 %** | 1.835 ± 1 | +18.1 ± 10.0 % | 1.50 |"
    lonely = choices.Case("lonely", {"x0_mse": {"7": 0.1}, "kid": {"0": 0.5}}, 2.0)
    assert lonely.gain(plain, "kid")[2] is False and math.isnan(lonely.gain(plain, "x0_mse")[0]), "one seed, and none in common"
    assert choices.plot([plain, other]).size[0] > 400
    with pytest.raises(choices.UserError, match="no finished run of case=plain"):
        choices.cases_of(tmp_path)


@pytest.mark.parametrize("mutation", load("mutations").MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_mutations_break_is_still_there(mutation) -> None:
    assert (SCRIPTS.parent / "diffusion_cli" / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1


def test_a_step_of_several_cards_is_the_formula() -> None:
    scaling = load("scaling")
    assert scaling.step(3.0, 10**9, 1, 1e9) == 3.0, "a single card exchanges nothing"
    assert scaling.step(3.0, 10**9, 2, 1e9) == 3.0 + 4.0 - 2.0  # 4 GB there at 1 GB/s, of which 2 s run beside
    assert scaling.step(9.0, 10**9, 2, 1e9) == 9.0
