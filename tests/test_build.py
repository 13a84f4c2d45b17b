"""One door from config to objects: only classes of this package or of a trusted one, of the expected kind; no other runs."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_cli.build import build
from diffusion_cli.errors import ConfigError
from diffusion_cli.losses import Loss
from diffusion_cli.losses.times import Times
from diffusion_cli.models import Network, UNetBasic
from diffusion_cli.optimizers import AdamW, Optimizer, Steps
from diffusion_cli.predictions import Eps, Prediction
from diffusion_cli.samplers import Sampler
from diffusion_cli.schedules import VP, Flow, Schedule, Shifted

FLOW = {"_target_": "diffusion_cli.schedules.Flow"}
HOSTILE = [
    "os.system", "posix.system", "subprocess.Popen", "subprocess.run", "torch.load", "torch.hub.load", "torch.nn.Linear",
    "builtins.open", "builtins.eval", "builtins.exec", "numpy.load", "pathlib.Path", "pathlib.Path.write_text", "pickle.loads",
    "urllib.request.urlretrieve", "importlib.import_module", "hydra.utils.instantiate", "hydra.utils.get_method",
    "logging.os.system",
    "shutil.rmtree", "antigravity", "this", "this.s", "ftplib.FTP", "xmlrpc.client.ServerProxy", "yaml.unsafe_load",
    "diffusion_cli.cli.sys.exit", "diffusion_cli.cli.os.system", "diffusion_cli.storage.os.replace",
    "diffusion_cli.storage.shutil.rmtree", "diffusion_cli.storage.remove", "diffusion_cli.storage.write",
    "diffusion_cli.storage.Path", "diffusion_cli.runs.SummaryWriter", "diffusion_cli.runs.Run",
    "diffusion_cli.checkpoint.Checkpoint", "diffusion_cli.cli.run", "diffusion_cli.commands.train.main",
    "diffusion_cli.build.build", "diffusion_cli.build.importlib.import_module",
    "diffusion_cli.signatures.importlib.util.find_spec",
    "diffusion_cli.errors.Stopped", "diffusion_cli.settings.Trainer", "diffusion_cli.models.UNet",
    "diffusion_cli.samplers.Heun",
    "diffusion_cli.schedules.torch.load", "diffusion_cli.schedules.math.sqrt", "diffusion_cli.models.dit.nn.Linear",
    "diffusion_cli.schedules.VP.alpha", "diffusion_cli.schedules.VP.__init__", "diffusion_cli.schedules.VP.__class__",
    "diffusion_cli.schedules.__loader__", "diffusion_cli.schedules.__builtins__", "diffusion_cli", "diffusion_cli.", "",
    "diffusion_cli.schedules", "diffusion_cli.schedules.", ".diffusion_cli.schedules.Flow", "..schedules.Flow",
    "schedules.Flow",
    "Flow", "diffusion_cli..schedules.Flow", "diffusion_cli.schedules..Flow", "diffusion_cli/schedules.Flow",
    "diffusion_cli.../../etc/passwd", "../diffusion_cli.schedules.Flow", "/etc/passwd", "diffusion_cli.schedules:Flow",
    "diffusion_cli.schedules.Flow()", "diffusion_cli.schedules.Flow ", " diffusion_cli.schedules.Flow",
    "Diffusion_cli.schedules.Flow",
    "diffusion_cli_evil.schedules.Flow", "diffusion_cli.schedules.flow", "diffusion_cli.data.digits.FILE",
    "diffusion_cli.\x00.Flow", "diffusion_cli.schedules\n.Flow", "ｄiffusion_cli.schedules.Flow", "a" * 10_000, "." * 5000,
    None, True, 3, 0.5, ["diffusion_cli.schedules.Flow"], {"_target_": "os.system"}, b"diffusion_cli.schedules.Flow", math.nan,
]  # fmt: skip
_names = (f"built_{i}" for i in itertools.count())


@pytest.mark.parametrize("target", HOSTILE, ids=lambda target: repr(target)[:60])
def test_hostile_target_is_refused(target: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one line, nothing new imported, nothing run."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    node = {
        "_target_": target,
        "command": "touch owned",
        "args": ["touch owned"],
        "f": "owned",
        "file": "owned",
        "path": "owned",
    }
    for hostile in (node, {"_target_": target}):
        with pytest.raises(ConfigError) as caught:
            build(hostile, Schedule, "schedule")
        assert len(str(caught.value).splitlines()) == 1 or "\n" in str(target)
        assert "schedule" in str(caught.value)
    assert set(sys.modules) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("node", [None, [], "diffusion_cli.schedules.Flow", 3, {}, {"target": "x"}, [FLOW]], ids=repr)
def test_no_node_is_refused(node: object) -> None:
    with pytest.raises(ConfigError, match="schedule"):
        build(node, Schedule, "schedule")


def test_a_target_inside_a_good_node_meets_the_same_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for inner in ("os.system", "diffusion_cli.storage.remove", "diffusion_cli.models.UNet", "diffusion_cli.cli.sys.exit"):
        node = {
            "_target_": "diffusion_cli.schedules.Shifted",
            "base": {"_target_": inner, "command": "touch owned"},
            "factor": 2.0,
        }
        with pytest.raises(ConfigError, match=r"schedule\.base\._target_ is"):
            build(node, Schedule, "schedule")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key", ["_partial_", "_args_", "_recursive_", "_convert_", "__class__", "__proto__", "self", "cls", "reaches_zero"]
)
def test_odd_keys_are_not_arguments(key: str) -> None:
    with pytest.raises(ConfigError, match="is not an option of Flow"):
        build({**FLOW, key: True}, Schedule, "schedule")


def test_what_constructors_refuse_is_said_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^model: .*head"):
        build(
            {"_target_": "diffusion_cli.models.DiT", "patch_size": 4, "width": 130, "depth": 1, "heads": 4,
            "mlp_ratio": 1.0, "dropout": 0.0},
            Network,
            "model",
            {"channels": 1, "image_size": 8, "num_classes": 0},
        )  # fmt: skip


@pytest.mark.parametrize(("kind", "place"), [(Schedule, "schedules"), (Sampler, "samplers"), (Prediction, "predictions"),
                                             (Network, "models"), (Optimizer, "optimizers"), (Times,
                                             "losses.times")])  # fmt: skip
def test_an_abstract_class_is_refused(kind: type, place: str) -> None:
    """A base class has the right lineage, but there is nothing to make of it."""
    given = {"schedule": Flow()} if kind is Prediction else {}
    if kind is Network:
        given = {"channels": 1, "image_size": 8, "num_classes": 0}
    node: dict[str, object] = {"_target_": f"diffusion_cli.{place}.{kind.__name__}"}
    if kind is Sampler:
        node |= {"steps": 1, "clip": False, "grid": {"_target_": "diffusion_cli.samplers.Own"}}
    with pytest.raises(ConfigError, match=kind.__name__):
        build(node, kind, "node", given)


def test_lists_become_tuples_and_nodes_become_objects() -> None:
    node = {
        "_target_": "diffusion_cli.optimizers.AdamW", "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8,
        "weight_decay": 0.0, "warmup": 0,
        "clip": None, "decay": {"_target_": "diffusion_cli.optimizers.Steps", "every": 5, "by": 0.5, "floor": 0.0},
    }  # fmt: skip
    assert build(node, Optimizer, "optimizer") == AdamW(1e-3, (0.9, 0.99), 1e-8, 0.0, 0, None, Steps(5, 0.5, 0.0))
    shifted = build({"_target_": "diffusion_cli.schedules.Shifted", "base": FLOW, "factor": 2}, Schedule, "schedule")
    assert shifted == Shifted(Flow(), 2)


def test_given_arguments_come_from_the_program_alone() -> None:
    vp = VP(0.1, 20.0)
    assert build({"_target_": "diffusion_cli.predictions.Eps"}, Prediction, "prediction", {"schedule": vp}) == Eps(vp)
    with pytest.raises(ConfigError, match=r"prediction\.schedule is not an option of Eps"):
        build({"_target_": "diffusion_cli.predictions.Eps", "schedule": FLOW}, Prediction, "prediction", {"schedule": vp})
    facts = {"channels": 1, "image_size": 8, "num_classes": 0}
    model = {"_target_": "diffusion_cli.models.UNetBasic", "widths": [8, 8], "kernel_size": 3}
    assert isinstance(build(model, Network, "model", facts), UNetBasic)
    with pytest.raises(ConfigError, match=r"model\.image_size is not an option"):
        build({**model, "image_size": 4}, Network, "model", facts)


@pytest.mark.parametrize("trusted", [True, False])
def test_trust_admits_a_package_and_only_that(trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(_names)
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from .mine import Bent\nfrom os import system\n")
    (tmp_path / name / "mine.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from dataclasses import dataclass\nfrom diffusion_cli.schedules import Flow\n"
        "from diffusion_cli.ranges import PositiveFloat\n"
        "@dataclass(frozen=True)\nclass Bent(Flow):\n    power: PositiveFloat = 2.0\n"
        "class Alone: ...\ndef Bend(power): return Bent(power)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": f"{name}.Bent", "power": 3.0}
    if not trusted:
        with pytest.raises(ConfigError, match=r"trust=\[package\]"):
            build(node, Schedule, "schedule")
        with pytest.raises(ConfigError, match="only classes of"):
            build(node, Schedule, "schedule", trust=[name[:-1], f"{name}.mine", "*", ""])
        assert name not in sys.modules and not (tmp_path / "ran").exists(), "refused before it was imported"
        return
    made = build(node, Schedule, "schedule", trust=[name])
    assert type(made).__module__ == f"{name}.mine" and made.power == 3.0 and isinstance(made, Schedule)
    for target in (f"{name}.Alone", f"{name}.mine.Alone", f"{name}.Bend", f"{name}.system", f"{name}.mine.Path"):
        with pytest.raises(ConfigError, match="schedule"):
            build({"_target_": target}, Schedule, "schedule", trust=[name])
    with pytest.raises(ConfigError, match="power"):
        build({**node, "power": -1}, Schedule, "schedule", trust=[name])


def test_a_class_that_is_not_what_its_source_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source was read; what is then really found must be that class: the second lock of the door."""
    monkeypatch.syspath_prepend(tmp_path)
    for other in ("subprocess.Popen", "Other", "lambda: Flow()", "Flow()"):
        name = next(_names)
        (tmp_path / f"{name}.py").write_text(
            "import subprocess\nfrom diffusion_cli.schedules import Flow\nclass Other: ...\nclass Mine(Flow): ...\n"
            f"Mine = {other}\n"
        )
        with pytest.raises(ConfigError, match="not a Schedule of this package"):
            build({"_target_": f"{name}.Mine"}, Schedule, "schedule", trust=[name])


def test_the_audit_hook_hears_nothing() -> None:
    """No file opened for writing, no process, no socket, no code compiled or run while all hostile targets are tried."""
    code = f"""
import json, sys
from diffusion_cli.build import build
from diffusion_cli.errors import ConfigError
from diffusion_cli.schedules import Schedule
heard = []
def hook(event, arguments):
    if event in ("exec", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.remove",
                  "os.rename", "shutil.rmtree"):
        heard.append(event)
    if event.startswith("socket.") or (event == "open" and arguments[1] and set(str(arguments[1])) & set("wax+")):
        heard.append(event)
sys.addaudithook(hook)
refused = 0
for target in json.loads({json.dumps(json.dumps([t for t in HOSTILE if isinstance(t, str)]))}):
    try:
        build({{"_target_": target, "command": "true"}}, Schedule, "schedule")
    except ConfigError:
        refused += 1
print(refused, *heard)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(sum(isinstance(t, str) for t in HOSTILE))], done.stdout + done.stderr


def test_a_loss_is_built_of_its_parts() -> None:
    part = "diffusion_cli.losses"
    node = {"_target_": f"{part}.Loss", "times": {"_target_": f"{part}.Uniform"}, "norm": {"_target_": f"{part}.MSE"}}
    with pytest.raises(ConfigError, match=r"^loss\.weight is missing: Loss needs it$"):
        build(node, Loss, "loss")
    built = build({**node, "weight": {"_target_": f"{part}.One"}}, Loss, "loss")
    assert isinstance(built, torch.nn.Module)
    with pytest.raises(ConfigError, match=r"loss\.weight\._target_ is diffusion_cli\.losses\.MSE: not a Weight"):
        build({**node, "weight": {"_target_": f"{part}.MSE"}}, Loss, "loss")
