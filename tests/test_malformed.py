"""Every key of a config, given what it cannot be, is refused in one line that names it, by a process that cannot import torch."""

import json
import subprocess
import sys
from pathlib import Path

from test_cli import LOOP

CONFIGS = """
import sys
sys.path.insert(0, TESTS)
""" + LOOP.partition("from diffusion_cli")[0] + """
import copy
import math
import hydra
from diffusion_cli import config, settings
from diffusion_cli.errors import ConfigError
CHECKS = {"train": config.check_train, "sample": config.check_sample, "evaluate": config.check_evaluate,
          "export": config.check_export, "report": config.check_report}
NEVER = {"nan": math.nan, "-inf": -math.inf, "node": {"x": {"y": 1}}, "lists": [[["deep"]]], "target": {"_target_": "os.system"}}
EXTRA = {"train": ["loss/times=discrete", "schedule=sigmoid", "codec=latents", "codec.ckpt=x", "adapter=lora", "init=x"],
         "sample": ["ckpt=x", "edit=inpaint", "init=x", "edit.mask=x", "guidance=apg", "sampler=sa_solver"],
         "evaluate": ["ckpt=x", "features=classifier", "features.ckpt=x"], "export": ["ckpt=x"], "report": ["runs=[x]"]}
for command, check in CHECKS.items():
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        node = config.plain(hydra.compose(command, EXTRA[command]))
    for path in settings.flat(node):
        for name, value in NEVER.items():
            changed = copy.deepcopy(node)
            place = changed
            *folders, key = path.split(".")
            for folder in folders:
                place = place[folder]
            if key not in place:
                continue
            place[key] = value
            try:
                check(changed)
                said = None
            except ConfigError as error:
                said = str(error)
            except Exception as error:
                said = "!" + repr(error)
            print(json.dumps([command, path, name, said]))
"""


def test_no_key_takes_what_it_cannot_be() -> None:
    """At least 300 malformed configs beside the malformed lines of test_cli.py."""
    done = subprocess.run(
        [sys.executable, "-c", CONFIGS.replace("TESTS", repr(str(Path(__file__).parent)))], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [row for row in told if row[3] is None or row[3].startswith("!") or row[1].rpartition(".")[2] not in row[3]]
    assert len(told) >= 300 and not wrong, f"{len(wrong)} of {len(told)}: {wrong[:20]}"
    print(f"{len(told)} malformed configs refused, none imported torch")
