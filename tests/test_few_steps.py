"""Few-step objectives, on data whose denoiser and probability flow are known exactly; and their runs."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from closed_form import FAMILIES, Gaussian, close, concrete, distance_from_uniform, f64, name
from tiny import compose, figures, hashes, stopped, train
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError
from diffusion_cli.losses import MSE, Adaptive, LogitNormal, Loss, MinSNR, One, Uniform
from diffusion_cli.models import DiT, UNet
from diffusion_cli.models.network import Network
from diffusion_cli.objectives import Consistency, MeanFlow, Progressive, Reflow, kept
from diffusion_cli.objectives.consistency import check_boundary, flowed
from diffusion_cli.objectives.method import Lesson
from diffusion_cli.objectives.reflow import straightness
from diffusion_cli.predictions import Prediction, V, Velocity
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Ancestral, Euler, Leap, last
from diffusion_cli.samplers import Uniform as Even
from diffusion_cli.sampling import sample
from diffusion_cli.schedules import EDM, Betas, Flow, Schedule
from diffusion_cli.walking import walk

DATA = Gaussian()


class Nothing(Network):
    """Answers 0: what is foreseen is said by the denoiser around it."""

    def __init__(self) -> None:
        super().__init__(1, 1, 0)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class Known(Denoiser):
    """A denoiser that foresees what a closed form says, and theta times a direction more."""

    direction: float | Tensor = 1.0

    def __init__(self, schedule: Schedule, foreseen) -> None:
        super().__init__(Nothing(), V(schedule))
        self.foreseen, self.theta = foreseen, torch.zeros((), dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, hint: Tensor | None = None) -> Tensor:
        return self.foreseen(x, t) + self.theta * self.direction


def to_data(schedule: Schedule):
    """The exact consistency function."""
    return lambda x, t: DATA.carry(schedule, x, t.view(-1, 1, 1, 1), f64(0)[0])


def lesson(denoiser: Denoiser, t: Tensor, step: int = 0, teacher: Denoiser | None = None) -> Lesson:
    """x0 of DATA and noise, [B, 1, 1, 1] float64, at t [B]."""
    generator = torch.Generator().manual_seed(4)
    x0, noise = torch.randn(2, len(t), 1, 1, 1, generator=generator, dtype=torch.float64)
    criterion, source = Loss(Uniform(), MSE(), One()), Source(0, torch.arange(len(t)), step)
    return Lesson(denoiser, criterion, source, DATA.m + DATA.s * x0, noise, t, torch.ones_like(t), None, teacher)


# -- consistency -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_the_second_time_is_that_of_easy_consistency_tuning(schedule: Schedule) -> None:
    """By hand, at rho = 1 and q = 2, k = 8, b = 1: adj = 1 + 8 sigmoid(-1) = 3.151531; below 0 in the first stages, then
    1 - adj / 2^(n + 1), which stays at its last stage; much noise takes almost exactly 1 - 1 / 2^(n + 1)."""
    method = Consistency(every=10, stages=4)
    t = schedule.t_of_log_snr(f64(0.0, -2 * math.log(10)))  # rho = 1 and 10
    for step, low, high in (
        (0, 0.0, 0.5),
        (9, 0.0, 0.5),
        (10, 0.212117, 0.75),
        (25, 0.606059, 0.875),
        (10**6, 0.901515, 0.96875),
    ):
        s, gap = (found.double() for found in method.earlier(schedule, t, step))
        rho = torch.where(s > 0, schedule.sigma(s) / schedule.alpha(s), 0)
        wanted = f64(low, 10 * (high - (1 - high) * 8 / (1 + math.exp(10))))
        close(rho / f64(1, 10), wanted / f64(1, 10), 2e-4)
        close(gap, f64(1, 10) - wanted, 2e-5)
        assert (s < t).all()


def test_it_begins_as_the_training_of_a_denoiser() -> None:
    """At s = 0 the target is the picture itself, so weight times the squared error of x0."""
    schedule = EDM()
    made = Known(schedule, DATA.denoise(schedule))
    t = schedule.t_of_log_snr(-2 * torch.linspace(-4, -0.1, 50, dtype=torch.float64))
    given = lesson(made, t)
    got = Consistency(every=1).loss(given)
    wanted = (made(given.x, t) - given.x0).square().flatten(1).mean(1) / schedule.sigma(t)
    close(got / wanted, torch.ones(()), 1e-5)
    snr = Consistency(every=1, weight="snr").loss(given)
    close(snr / wanted, schedule.sigma(t) * (1 / schedule.sigma(t) ** 2 + 4), 1e-4)
    close(Consistency(every=1, weight="even").loss(given) / wanted, schedule.sigma(t), 1e-5)


@pytest.mark.parametrize("schedule", [EDM(), Flow(), Betas("cosine")], ids=name)
def test_the_exact_map_is_a_fixed_point_and_the_denoiser_is_none(schedule: Schedule) -> None:
    """The mean gradient of what moves f by a constant, for each rho of the gap: 0 as the times meet; seen with 200,000 pictures
    at rho = 1. For E[x0 | x_t] in the place of f it stays."""
    t = schedule.t_of_log_snr(torch.zeros(200_000, dtype=torch.float64))

    def gradient(foreseen) -> float:
        made = Known(schedule, foreseen)
        x = lesson(made, t).x
        made.direction = (x - x.mean()) / x.std() - 1
        loss = Consistency(every=1, stages=7).loss(lesson(made, t, step=7)).mean()
        return float(torch.autograd.grad(loss, made.theta)[0])

    assert abs(gradient(to_data(schedule))) < 0.02 < 0.1 < abs(gradient(DATA.denoise(schedule)))


@pytest.mark.parametrize("schedule", [EDM(), Flow(), Betas("cosine")], ids=name)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_distilled_the_exact_map_costs_nothing_as_the_times_meet(schedule: Schedule, solver: str) -> None:
    """A teacher's step is off by the square of the gap, or by its cube; so the target, and the distance to it."""
    exact = Known(schedule, to_data(schedule))
    teacher = Known(schedule, DATA.denoise(schedule))
    t = schedule.t_of_log_snr(torch.linspace(-3, 3, 40, dtype=torch.float64))
    off = []
    for stage in (5, 6):
        method = Consistency(every=1, stages=9, k=0.0, teacher="there", solver=solver)  # type: ignore[arg-type]
        given = lesson(exact, t, stage, teacher)
        s, gap = method.earlier(schedule, t, stage)
        carried = flowed(given, given.x, t, s.double(), solver == "heun")
        off.append(
            (carried - DATA.carry(schedule, given.x, t[:, None, None, None], s.double()[:, None, None, None])).abs().amax()
        )
        assert float((method.loss(given).detach() * gap).sqrt().max()) < 3 * float(off[-1]) + 1e-6
    assert off[0] / off[1] > (3.5 if solver == "euler" else 6.5) and off[0] < 0.01


def test_a_teacher_of_another_schedule_is_asked_at_the_same_noise() -> None:
    t = f64(0.2, 0.5, 0.9)
    given = lesson(Known(Flow(), to_data(Flow())), t, teacher=Known(EDM(), DATA.denoise(EDM())))
    close(given.foreseen_by_teacher(given.x, t), DATA.denoise(Flow())(given.x, t), 1e-9)


def test_which_predictions_give_a_clean_picture_back() -> None:
    """Refused are those whose x0 of a clean picture is not that picture, whatever the network says."""
    generator = torch.Generator().manual_seed(0)
    x, F = torch.randn(2, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
    refused = set()
    for kind in concrete(Prediction):
        made: Prediction = kind(Betas())
        t = f64(1e-6)
        gives_back = float((made.decode(F, x, t)[0] - x).abs().max()) < 0.01
        try:
            check_boundary(Denoiser(Nothing(), made))
        except ValueError as error:
            assert "f(x, 0) = x" in str(error) and not gives_back
            refused.add(kind.__name__)
        else:
            assert gives_back, kind
    assert refused == {"X0", "NextStep"}


def test_only_one_weight_counts() -> None:
    with pytest.raises(ValueError, match="loss/weight=one"):
        Consistency(every=1).check(Denoiser(Nothing(), Velocity(Flow())), Loss(Uniform(), MSE(), MinSNR()))
    with pytest.raises(ValueError, match="q is 1"):
        Consistency(every=1, q=1.0)


def test_the_adaptive_norm_has_the_gradient_of_a_power() -> None:
    F, target = torch.randn(2, 5, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    F.requires_grad_()
    for p in (0.0, 0.5, 0.75, 1.0):
        got = torch.autograd.grad(Adaptive(p, 1e-12)(F, target).sum(), F)[0]
        m = (F - target).square().flatten(1).mean(1)
        power = m ** (1 - p) / (1 - p) if p < 1 else m.log()
        close(got, torch.autograd.grad(power.sum(), F)[0], 1e-9)


# -- mean flows --------------------------------------------------------------------------------------------------------


class Average(Network):
    """The exact average velocity of the straight line for DATA, told 10 t and 10 (t - s); or half as much of it."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__(1, 1, 0, two_times=True)
        self.share = share

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        t, gap = (time / 10)[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
        apart = gap > 0
        far = (x - DATA.carry(Flow(), x, t, t - gap)) / torch.where(apart, gap, 1)
        here = (x - DATA.denoise(Flow())(x, t.flatten())) / t  # v, as x0 = x - t v
        return self.share * torch.where(apart, far, here)


def test_the_target_of_mean_flows_is_that_of_finite_differences() -> None:
    """v - (t - s) du/dt along (v, 1), for the exact u and for half of it; and with s = t it is v."""
    t = torch.linspace(0.15, 0.95, 30, dtype=torch.float64)
    for share in (1.0, 0.5):
        made = Denoiser(Average(share), Velocity(Flow()))
        made.network.forward = lambda x, time, cond=None, own=made.network.forward: own(x.double(), time.double())  # type: ignore[method-assign]
        made.output = lambda x, t, told=None, hint=None, s=None, net=made.network: net(  # type: ignore[method-assign]
            x, 10 * torch.stack([t, t - s], 1)
        )
        given, h = lesson(made, t), 1e-5
        v = given.noise - given.x0
        for s in (0.3 * t, t):
            along = lambda e, s=s, v=v, given=given, made=made: made.output(given.x + e * v, t + e, s=s)[0]  # noqa: E731
            du = (along(h) - along(-h)) / (2 * h)
            wanted = v - (t - s)[:, None, None, None] * du if (s < t).all() else v
            close(MeanFlow().target(given, s), wanted, 1e-6)


def test_the_exact_average_velocity_is_a_fixed_point_of_mean_flows() -> None:
    """Where x0 and noise are those that v itself leads through: v(x_t) = noise - x0, so the target is u to rounding."""
    made = Denoiser(Average(), Velocity(Flow()))
    t = torch.linspace(0.15, 0.95, 30, dtype=torch.float64)
    given = lesson(made, t).towards(DATA.denoise(Flow())(lesson(made, t).x, t))
    s = 0.4 * t
    close(MeanFlow().target(given, s), made.output(given.x, t, s=s)[0].double(), 2e-5)


def test_two_times_are_drawn_in_order_and_some_are_one() -> None:
    t = Uniform().sample(Flow(), Source(0, torch.arange(4000)))
    given = lesson(Denoiser(Average(), Velocity(Flow())), t)
    later, earlier = MeanFlow(apart=0.75).two(given)
    assert (earlier <= later).all() and abs(float((earlier < later).double().mean()) - 0.75) < 0.03
    assert distance_from_uniform(later[earlier < later] ** 2) < 0.04, "the later of two has the law of a maximum"
    assert not (MeanFlow(apart=0.0).two(given)[0] > MeanFlow(apart=0.0).two(given)[1]).any()
    late = MeanFlow(apart=1.0, second=LogitNormal(9.0, 0.1)).two(given)
    assert (late[0] > 0.99).all() and torch.equal(late[1], torch.minimum(t, late[1])), "the second has a law of its own"


@pytest.mark.parametrize("made", [Leap(1, Even(), False), Leap(3, Even(), False), Leap(3, Even(), False, 1.0, "all")])
def test_leaps_along_the_exact_average_velocity_are_exact(made: Leap) -> None:
    """Any grid ends where the path ends; with fresh noise, in the data's own law. A walk that leads nowhere does not."""
    denoiser, source = Denoiser(Average(), Velocity(Flow())), Source(3, torch.arange(20_000))
    states = list(walk(denoiser, made, source))
    x = states[0].x
    wanted = DATA.carry(Flow(), x, f64(1)[0], f64(0)[0])
    u = torch.special.ndtr((states[-1].x - DATA.m) / DATA.s)
    # x_1 is N(0, 1), as the data's is, so the law is exact
    assert distance_from_uniform(u) < 1.95 / math.sqrt(len(u))
    if made.eta == 0:
        close(states[-1].x, wanted, 2e-5)
        plain = last(walk(denoiser, Ancestral(made.steps, Even(), False), source)).x
        assert float((plain - wanted).abs().mean()) > 0.05


@pytest.mark.parametrize("network", [UNet, DiT])
def test_a_network_of_one_time_becomes_one_of_two(network: type[Network]) -> None:
    """The same answers whatever the second time, until it is learned; with forward derivatives, dropout alike."""
    small = {"width": 16, "groups": 8, "multipliers": (1, 2), "dropout": 0.3} if network is UNet else {"width": 16, "depth": 2}
    one, two = network(1, 8, 3, **small), network(1, 8, 3, two_times=True, **small)  # type: ignore[arg-type]
    stir(one)
    fresh = {key: value for key, value in two.state_dict().items() if ".span." in key}
    assert fresh
    two.load_state_dict({**fresh, **one.state_dict()})
    x, time, labels = torch.randn(4, 1, 8, 8), torch.rand(4) * 1000, torch.arange(4)
    one.eval(), two.eval()
    close(two(x, torch.stack([time, time / 2], 1), labels), one(x, time, labels), 1e-6)
    stir(two)
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    criterion = Loss(Uniform(), MSE(), One())
    given = Lesson(Denoiser(two.train(), Velocity(Flow())), criterion, Source(0, torch.arange(4)), x0, noise, time / 1000,
                   torch.ones(4), labels)  # fmt: skip
    torch.manual_seed(1)
    target = MeanFlow().target(given, time / 2000)
    along = []
    for e in (1e-4, -1e-4):  # the fastest wave of time turns by 0.1
        torch.manual_seed(1)
        with torch.no_grad():
            v = noise - x0
            along.append(given.denoiser.output(given.x + e * v, given.t + e, labels, s=time / 2000)[0])
    wanted = v - (time / 2000)[:, None, None, None] * (along[0] - along[1]) / 2e-4
    assert float((target - wanted).abs().max()) < 0.02 * float((wanted - v).abs().max()), "the same dropout, too"


def stir(network: Network) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


# -- progressive distillation and reflow -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_one_step_of_the_student_is_two_of_the_teacher(schedule: Schedule) -> None:
    """DDIM from t = k / N to (k - 1) / N by the target, and by the sampler itself in two halves: equal to rounding."""
    teacher, n = Known(schedule, DATA.denoise(schedule)), 4
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    given = lesson(teacher, t, teacher=teacher)
    taught = Progressive("there", n).taught(given)
    close(taught.x, given.x, 1e-9)
    for k in range(n):
        x, times = given.x[k : k + 1], t[k] - f64(0, 0.5, 1) / n
        two = list(Ancestral(2, Even(), False).moves(DATA.denoise(schedule), schedule, x, times, lambda *_: f64(0)))[-1].x
        one = schedule.transfer(x, taught.x0[k : k + 1], t[k], times[2])
        close(one, two, 1e-9 * float(1 + two.abs().max()))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_teachers_step_is_of_its_solvers_order(solver: Literal["euler", "heun"], order: int) -> None:
    """Half of the step, and a half, a quarter of the error by Heun's rule: the target nears the end of the exact path."""
    schedule, t = Flow(), f64(0.75)
    teacher, off = Known(schedule, DATA.denoise(schedule)), []
    for n in (64, 128):
        given = lesson(teacher, t, teacher=teacher)
        end = schedule.transfer(given.x, Progressive("there", n, solver).taught(given).x0, t[0], t[0] - 1 / n)
        off.append(float((end - DATA.carry(schedule, given.x, t[0], t[0] - 1 / n)).abs().max()) * n)  # of the whole path
    assert math.log2(off[0] / off[1]) == pytest.approx(order, abs=0.2)


def test_the_student_is_asked_at_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Lesson, "loss", lambda self: seen.append(self.t) or self.t)
    teacher = Known(Flow(), DATA.denoise(Flow()))
    Progressive("there", 5).loss(lesson(teacher, torch.rand(300, dtype=torch.float64).clamp(min=1e-6), teacher=teacher))
    assert set((seen[0] * 5).tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_pairs_are_noise_and_where_the_teacher_leads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept or not, by number alone: x is the teacher's walk from that very z; another teacher makes other pairs."""
    monkeypatch.setattr(kept, "cache_home", lambda: tmp_path)
    teacher = Denoiser(Average(), Velocity(Flow()))
    method, device = Reflow("there", 50, Euler(64, Even(), False)), torch.device("cpu")
    ids = torch.tensor([3, 49, 3])
    made = []
    for cache in (True, True, False):
        x0, z, told = method.prepared(teacher, [], cache, device)(ids)
        assert told is None and torch.equal(x0[0], x0[2]) and not torch.equal(x0[0], x0[1])
        close(x0.double(), DATA.carry(Flow(), z.double(), f64(1)[0], f64(0)[0]), 0.02)
        made.append((x0, z))
    assert all(torch.equal(a, b) for pair in made[1:] for a, b in zip(pair, made[0], strict=True))
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    teacher.digest = "another"
    method.prepared(teacher, [], True, device)
    assert len(list(tmp_path.rglob("*.npy"))) == 2


def test_whose_label_was_hidden_is_told_none() -> None:
    given = lesson(
        Denoiser(UNet(1, 8, 10, width=8, groups=4, multipliers=(1,), attention_levels=()), Velocity(Flow())), torch.rand(300)
    )
    pairs = lambda ids: (given.x0, given.noise, ids % 10)  # noqa: E731
    hidden = torch.arange(300) % 3 == 0
    told = (
        Reflow("there", 50, Euler(2, Even(), False)).coupled(replace(given, told=torch.where(hidden, 10, 0), pairs=pairs)).told
    )
    assert torch.equal(told == 10, hidden) and set(told.tolist()) == set(range(11))


def test_straightness_in_closed_form() -> None:
    """The path of N(m, s^2) is x_t = (1 - t) m + a(t) e, a(t) = sqrt((1 - t)^2 s^2 + t^2), so the whole move and the velocity
    differ by (1 - s - a') e, and the integral of its square is that of a'^2 less (1 - s)^2. Paths of points are straight."""
    steps, s = 200, DATA.s
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    rate = (t - (1 - t) * s**2) / torch.sqrt((1 - t) ** 2 * s**2 + t**2)
    denoiser, source = Denoiser(Average(), Velocity(Flow())), Source(0, torch.arange(2000))
    e = Flow().noise(source, "start", (1, 1, 1))
    wanted = e.square().flatten(1).mean(1) * (rate.square().mean() - (1 - s) ** 2)
    got = straightness(denoiser, source, None, steps)
    assert float((got.mean() / wanted.mean() - 1).abs()) < 0.02 and float(wanted.mean()) > 0.02
    point = Known(Flow(), lambda x, t: torch.zeros_like(x))
    assert float(straightness(point, source, None).detach().max()) < 1e-9


# -- samplers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDM(), Flow(), Betas("cosine")], ids=name)
def test_the_exact_map_makes_exact_samples(schedule: Schedule) -> None:
    """In one step the very end of the path; in several, with fresh noise at each, the data's own distribution."""
    generator = torch.Generator().manual_seed(2)
    one = f64(1)[0]
    x = schedule.alpha(one) * DATA.m + DATA.spread(schedule, one) * torch.randn(20_000, 1, 1, 1, generator=generator).double()
    fresh = lambda step, which=0: torch.randn(x.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    made = [last(Ancestral(1, Even(), False).walk(to_data(schedule), schedule, x, fresh)).x]
    made.append(last(Ancestral(3, Even(), False, 1.0, "all").walk(to_data(schedule), schedule, x, fresh)).x)
    close(made[0], DATA.carry(schedule, x, one, f64(0)[0]), 1e-9)
    for samples in made:
        u = torch.special.ndtr((samples - DATA.m) / DATA.s)
        assert distance_from_uniform(u) < 1.95 / math.sqrt(len(u))
    assert float((made[0] - made[1]).abs().mean()) > 0.1, "the noise was fresh"


# -- runs --------------------------------------------------------------------------------------------------------------

RUNS = {
    "consistency": ("objective=consistency", "loss=consistency", "sampler=multistep", "objective.method.every=2"),
    "mean flow": ("objective=meanflow", "loss=meanflow", "sampler=leap"),
    "progressive": ("objective=progressive", "objective.method.steps=2", "sampler=ddim"),
    "reflow": (
        "objective=reflow",
        "objective.method.teacher={teacher}",
        "objective.method.pairs=20",
        "objective.cache=false",
        "objective.method.sampler.steps=2",
        "sampler=euler",
    ),
    "distilled": ("objective=consistency", "objective.method.every=2", "objective.method.teacher={teacher}"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("teacher"), "dataset.labels=true", name="teacher")


def words_of(kind: str, teacher: Path) -> list[str]:
    """From the teacher's weights, and towards it where the method has one."""
    more = ("dataset.labels=true", "model.dropout=0.2", "trainer.steps=6", "trainer.save_every=0", "trainer.evaluate_every=3")
    return [word.format(teacher=teacher) for word in (f"init={teacher}", *more, *RUNS[kind])]


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_resumed_to_the_bit_and_sampled(kind: str, teacher: Path, tmp_path: Path) -> None:
    """6 steps, and 3 and 3; then one-step samples, also when the teacher is gone."""
    given = words_of(kind, teacher)
    whole = train(tmp_path / "whole", *given)
    stopped(tmp_path / "parts", 3, *given)
    parts = train(tmp_path / "parts", *given)
    assert hashes(parts) == hashes(whole) and figures(parts) == figures(whole)
    assert all(math.isfinite(row["train/loss"]) for row in figures(whole) if "train/loss" in row)
    away = teacher.rename(teacher.with_name("away"))
    try:
        asked = (f"ckpt={whole}", "n=4", "batch=4", "device=cpu", "sampler=onestep", f"out={tmp_path / 'made'}")
        folder = sample(config.check_sample(compose(*asked, primary="sample")))
    finally:
        away.rename(teacher)
    assert len(list(folder.glob("0*.png"))) == 4


def test_the_method_changes_what_is_learned(teacher: Path, tmp_path: Path) -> None:
    ends = [hashes(train(tmp_path / kind, *words_of(kind, teacher)))["weights.safetensors"] for kind in RUNS]
    ends.append(hashes(train(tmp_path / "plain", *words_of("consistency", teacher), "objective=denoising",
                             "objective.method.every=DEFAULT"))["weights.safetensors"])  # fmt: skip
    assert len(set(ends)) == len(RUNS) + 1


def test_another_teacher_is_refused_and_a_moved_one_taken(teacher: Path, tmp_path: Path) -> None:
    given = words_of("distilled", teacher)
    run = train(tmp_path, *given, "trainer.steps=2")
    moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
    train(tmp_path, *given, f"objective.method.teacher={moved}", "trainer.steps=3")
    other = train(tmp_path, "dataset.labels=true", "seed=1", name="other")
    with pytest.raises(ConfigError, match="teacher is not the one that the run began with"):
        train(tmp_path, *given, f"objective.method.teacher={other}", "trainer.steps=4")
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match=r"objective.method.teacher=.* does not exist"):
        train(tmp_path, *given, f"objective.method.teacher={moved}", "trainer.steps=4")
    assert run.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("prediction=x0",), "prediction=x0 does not give a clean picture back"),
        (("loss=min_snr",), "write loss/weight=one"),
        (("objective.self_conditioning=0.5",), "do not go together"),
        (("objective.method.q=0.5",), "q is 0.5"),
        (("objective=progressive",), "objective=progressive learns from a trained model: say which, init="),
        (("objective=reflow", "schedule=flow"), "objective=reflow learns from a trained model: say which, init="),
        (("objective=meanflow", "schedule=vp", "prediction=v"), "mean flows are of the straight line"),
        (
            ("objective=meanflow", "model=unet_gated", "model.multipliers=DEFAULT", "model.groups=DEFAULT"),
            "takes a second time",
        ),
    ],
)
def test_what_cannot_be_is_said_before_data_is_read(more: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        train(tmp_path, *{word.partition("=")[0]: word for word in ("objective=consistency", *more)}.values())
    assert not (tmp_path / "run").exists()


def test_who_leaps_is_a_teacher_of_half_its_steps_alone(teacher: Path, tmp_path: Path) -> None:
    four = train(
        tmp_path, *words_of("progressive", teacher), "objective.method.steps=4", "objective.method.solver=heun", name="four"
    )
    ours = lambda *more: (*words_of("progressive", four), *more)  # noqa: E731
    with pytest.raises(
        ConfigError, match=r"teacher=.*/four: it goes in 4 of DDIM's steps and in no others: choose .*steps=2 .*=euler"
    ):
        train(tmp_path, *ours("objective.method.steps=3"), name="two")
    with pytest.raises(ConfigError, match=r"choose objective\.method\.steps=2 objective\.method\.solver=euler"):
        train(tmp_path, *ours("objective.method.solver=heun"), name="two")
    two = train(tmp_path, *ours(), name="two")
    one = train(tmp_path, *words_of("progressive", two), "objective.method.steps=1", name="one")
    with pytest.raises(ConfigError, match="an odd number has no half"):
        train(tmp_path, *words_of("progressive", one), "objective.method.steps=1", name="none")
    with pytest.raises(ConfigError, match="leaps to the picture and no longer denoises: name the run that it began from"):
        train(tmp_path, *words_of("reflow", one), name="straight")


@pytest.mark.parametrize(
    ("kind", "known", "strange"),
    [
        ("progressive", ("ddim sampler.steps=2", "euler sampler/grid=uniform sampler.steps=2"),
         ("ddim sampler.steps=4", "onestep", "heun sampler.steps=2", "ddim sampler.steps=2 sampler.eta=1", "dpm_adaptive")),
        ("consistency", ("onestep", "multistep", "leap", "lcm", "ddim sampler.steps=1", "heun sampler.steps=1"),
         ("ddim sampler.steps=2", "heun sampler.steps=2", "rk45")),
        ("mean flow", ("onestep", "leap", "heun sampler.steps=3"), ()),
    ],
)  # fmt: skip
def test_a_walk_that_was_not_taught_is_said(
    kind: str,
    known: tuple[str, ...],
    strange: tuple[str, ...],
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(tmp_path, *words_of(kind, teacher), "trainer.steps=1")
    for number, words in enumerate((*known, *strange)):
        asked = (f"ckpt={run}", "n=2", "device=cpu", f"out={tmp_path / str(number)}", *f"sampler={words}".split())
        capsys.readouterr()
        sample(config.check_sample(compose(*asked, primary="sample")))
        said = capsys.readouterr().out
        assert (" was taught one walk, and this is another: sampler=ddim sampler.steps=2 " in said) == (
            kind == "progressive" and words in strange
        )
        assert (" leaps to the picture" in said) == (kind == "consistency" and words in strange), words


def test_a_teacher_of_other_pictures_is_refused(teacher: Path, tmp_path: Path) -> None:
    for more, said in ((("dataset.size=12",), "image_size is 8 there and 12 here"), ((), "told other classes")):
        with pytest.raises(ConfigError, match=said):
            train(tmp_path, "objective=consistency", f"objective.method.teacher={teacher}", *more)
