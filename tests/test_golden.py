"""Checkpoints of every format that was released are read for good. tests/golden/format_N: one of each, of this tiny run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import compose, figures, train

from diffusion_cli import __version__, checkpoint, config
from diffusion_cli.errors import StorageError
from diffusion_cli.sampling import sample

GOLDEN = Path(__file__).parent / "golden"
RUN = (  # of 4 steps
    "model.width=4", "model.groups=2", "dataset.labels=true", "loss=simple", "trainer.keep=1", "trainer.evaluate_every=4",
)  # fmt: skip
LOSSES = {5: 1.5840213, 6: 1.7867938}
MEANS = (92.0625, 133.5)  # of samples 0 and 1 of seed 0


@pytest.mark.parametrize("number", range(1, checkpoint.FORMAT + 1))
def test_a_checkpoint_of_that_format_samples_and_goes_on(number: int, tmp_path: Path) -> None:
    """To rounding as the program that wrote it did: the pictures of its average, and the losses of two more steps."""
    (saved,) = (GOLDEN / f"format_{number}").iterdir()
    assert json.loads((saved / "manifest.json").read_text())["format"] == number
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoints" / saved.name)
    asked = compose(f"ckpt={run}", "n=2", f"out={tmp_path / 'out'}", "sampler.steps=4", "device=cpu", primary="sample")
    sample(config.check_sample(asked))
    means = [float(np.asarray(Image.open(path), dtype=float).mean()) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert means == pytest.approx(MEANS, abs=0.5)
    train(tmp_path, *RUN, "trainer.steps=6")
    losses = {row["step"]: row["train/loss"] for row in figures(run) if "train/loss" in row}
    assert losses == pytest.approx(LOSSES, abs=1e-4)


def test_a_newer_format_names_the_version_to_install(tmp_path: Path) -> None:
    """And is not passed over for an older checkpoint: that would silently lose training."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(GOLDEN / f"format_{checkpoint.FORMAT}" / "step_00000004", folder / "step_00000004")
    shutil.copytree(folder / "step_00000004", folder / "step_00000008")
    manifest = folder / "step_00000008" / "manifest.json"
    facts = json.loads(manifest.read_text()) | {"format": checkpoint.FORMAT + 1, "program": "diffusion_cli 9.9.1", "step": 8}
    manifest.write_text(json.dumps(facts))
    wanted = re.escape(f"which reads up to {checkpoint.FORMAT}: pip install 'diffusion-cli>=9.9.1'")
    with pytest.raises(StorageError, match=rf"written by diffusion_cli 9\.9\.1 in format .*{re.escape(__version__)}.*{wanted}"):
        train(tmp_path, *RUN)
    assert len(checkpoint.folders(folder)) == 2
