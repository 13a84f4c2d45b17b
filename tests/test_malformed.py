"""Every key of every command's config, given what it cannot be, is refused in a line that names it, before torch."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import copy, json, math, sys
import hydra
from diffusion_cli import config, settings
from diffusion_cli.errors import ConfigError

ASKED = {
    "train": ["loss/times=discrete", "schedule=sigmoid", "codec=latents", "codec.ckpt=x", "adapter=lora", "init=x"],
    "sample": ["ckpt=x", "edit=inpaint", "init=x", "edit.mask=x", "guidance=apg", "sampler=sa_solver"],
    "evaluate": ["ckpt=x", "features=classifier", "features.ckpt=x"],
    "export": ["ckpt=x"],
    "report": ["runs=[x]"],
}
NEVER = {"nan": math.nan, "-inf": -math.inf, "node": {"x": {"y": 1}}, "lists": [[["deep"]]], "target": {"_target_": "os.abort"}}
WORDS = ("name", "ckpt", "prompt", "negative", "licence", "runs")  # a number is a word there
for command, words in ASKED.items():
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        node = config.plain(hydra.compose(command, words))
    for path in settings.flat(node):
        for name, value in NEVER.items():
            changed = copy.deepcopy(node)
            place, (*folders, key) = changed, path.split(".")
            for folder in folders:
                place = place[folder]
            if key not in place or (key in WORDS and isinstance(value, float)):
                continue
            place[key] = value
            try:
                said = getattr(config, f"check_{command}")(changed) and ""
            except ConfigError as error:
                said = str(error)
            except Exception as error:
                said = f"!{error!r}"
            print(json.dumps([command, path, name, said]))
assert "torch" not in sys.modules
"""


def test_no_key_takes_what_it_cannot_be(tmp_path: Path) -> None:
    """Beside the malformed lines of test_cli.py."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [row for row in told if row[3].startswith("!") or row[1].rpartition(".")[2] not in row[3] or len(row[3]) > 2000]
    assert len(told) >= 800 and not wrong, f"{len(wrong)} of {len(told)}: {wrong[:20]}"
    assert not list(tmp_path.iterdir())
    print(f"{len(told)} malformed configs are refused by a process that has no torch")
