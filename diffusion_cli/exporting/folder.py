"""to=folder: a checkpoint for asking alone, which diffusion-sample reads. to=safetensors: the network's weights in one file.

Both hold the config in full, but no path of the machine where it was trained: of a path only the last part is carried.
"""

import json

import safetensors.torch

from diffusion_cli.alone import alone, portable
from diffusion_cli.exporting.parcel import Model, Parcel
from diffusion_cli.pretrained.trained import GROUPS, group_of
from diffusion_cli.stages import FOLDER


def folder(model: Model) -> Parcel:
    """The weights that were asked for, without optimizer and trainer: no run goes on from it."""
    found, weights = model.found, model.settings.weights
    group, files = group_of(weights), alone(found, "denoiser", weights)
    for path in sorted((found.run / FOLDER).glob("*/*")):  # the autoencoder and the text encoder that it stands on
        files[path.relative_to(found.run).as_posix()] = path.read_bytes()
    words = " ".join(filter(None, ["weights=raw" if weights == "raw" else "", f"'{model.trust}'" if model.trust else ""]))
    more = f" {words}" if words else ""
    guided = f"\ndiffusion-sample ckpt=. n=16 label=all guidance=2 out=guided{more}" if model.facts["taught"] else ""
    asked = "prompt='a red square' guidance=cfg " if "texts" in model.facts else ""
    told = "tokens" if "texts" in model.facts else "labels"
    use = f"""`{group}.safetensors` holds the weights, `config.json` all choices of the run, `manifest.json` a SHA-256 of each.
With `pip install diffusion-cli`:

```bash
diffusion-sample ckpt=. {asked}n=16 seed=0 out=pictures{more}{guided}
```

From Python, a denoiser that answers `denoiser(x, t, {told}) -> x0`, t from 0 (data) to 1 (noise):

```python
from pathlib import Path
from diffusion_cli.finding import find, load_denoiser

denoiser = load_denoiser(find(Path(".")), "{weights if weights in GROUPS else "ema"}"{_trusted(model)})
```"""
    return Parcel(files, use, "diffusion-cli", ("safetensors",))


def safetensors_file(model: Model) -> Parcel:
    """model.safetensors: the network's own names; the config and the facts of the data in its header."""
    about = {"config": portable(model.node), "facts": model.facts, "weights": model.settings.weights, "step": model.found.step}
    tensors = {name: value.contiguous() for name, value in model.denoiser.network.state_dict().items()}
    told, empty = "labels", ""
    if "texts" in model.facts:
        tensors["null"] = model.denoiser.null
        told, empty = "tokens", 'denoiser.null.copy_(weights.pop("null"))  # the tokens of the empty text\n'
    data = safetensors.torch.save(tensors, {"format": "pt", "diffusion_cli": json.dumps(about)})
    use = f"""`model.safetensors` holds the network's weights, and in its header the config, as JSON under `diffusion_cli`.
With `pip install diffusion-cli` it is a denoiser again, `denoiser(x, t, {told}) -> x0`, t from 0 (data) to 1 (noise):

```python
import json
from safetensors import safe_open
from diffusion_cli.assembly import denoiser_of

with safe_open("model.safetensors", "pt") as file:
    about = json.loads(file.metadata()["diffusion_cli"])
    weights = {{name: file.get_tensor(name) for name in file.keys()}}
denoiser = denoiser_of(about["config"], about["facts"]{_trusted(model)}).eval()
{empty}denoiser.network.load_state_dict(weights)
```"""
    parts = {"codec": "the autoencoder of its latents", "texts": "what makes tokens of texts"}
    limits = tuple(f"Without {what}: to=folder carries it." for fact, what in parts.items() if fact in model.facts)
    return Parcel({"model.safetensors": data}, use, "diffusion-cli", ("safetensors",), limits)


def _trusted(model: Model) -> str:
    return f", {model.settings.trust!r}" if model.settings.trust else ""
