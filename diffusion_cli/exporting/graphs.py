"""to=torch_export and to=onnx: the network as a graph, F = network(x, time, labels or tokens), for any batch, without this
package; and each part around it as one of its own (parts.py): the encoder of texts, the autoencoder's two halves.

What else is around it, the schedule and the prediction, is in walk.json as numbers (moves.py). Graphs are traced by
torch.export; a part that it cannot trace is refused with its reason, but for the encoder of texts, which is left out then.
"""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting.moves import loop, walk_of
from diffusion_cli.exporting.parcel import MEAN_ALONE, Model, Parcel
from diffusion_cli.exporting.parts import Part, beside, network_of
from diffusion_cli.stages import stages_of

WORDS = "tokenizer.json"
NULL = "null.npy"


def torch_export(model: Model) -> Parcel:
    """network.pt2 and those beside it: what torch.export.load reads."""
    files, parts, limits = _files(model, _pt2, "torch.export")
    opened = "\n".join(
        f'{part.name} = torch.export.load("{part.name}.pt2").module()' for part in parts if part.name != "encoder"
    )
    use = f"""{_signature(model, parts, "pt2")}

A `.pt2` is a zip archive: the graph as JSON (`models/model.json`), the weights as bare numbers (`data/weights/`), and the
inputs that it was traced with as a small pickle (`data/sample_inputs/`). `torch.export.load` may unpickle parts of such an
archive: load no .pt2 from a source that you do not trust.

```python
import json
from pathlib import Path
{"import numpy" + chr(10) if NULL in files else ""}import torch
from PIL import Image
{_tokenizers(parts)}
{opened}
walk = json.loads(Path("walk.json").read_text())
with torch.no_grad():
{_indented(loop(model, "torch", parts))}
pictures = ((pictures.clip(-1, 1) + 1) * 127.5).round().byte().numpy()
{_saving(model)}
```"""
    return Parcel(files, use, "pytorch", ("torch-export",), limits)


def onnx(model: Model) -> Parcel:
    """network.onnx and those beside it: what onnxruntime and others read; weights of more than 2 GB lie beside it."""
    files, parts, limits = _files(model, _onnx, "torch.onnx")
    opened = "\n".join(
        f'{part.name} = onnxruntime.InferenceSession("{part.name}.onnx")' for part in parts if part.name != "encoder"
    )
    use = f"""{_signature(model, parts, "onnx")}

With `pip install onnxruntime pillow{" tokenizers" if WORDS in files else ""}`:

```python
import json
from pathlib import Path
import numpy as np
import onnxruntime
from PIL import Image
{_tokenizers(parts)}
{opened}
walk = json.loads(Path("walk.json").read_text())
{loop(model, "numpy", parts)}
pictures = ((pictures.clip(-1, 1) + 1) * 127.5).round().astype("uint8")
{_saving(model)}
```"""
    return Parcel(files, use, "onnx", ("onnx",), limits)


def _files(
    model: Model, traced: Callable[[Part], dict[str, bytes]], tracer: str
) -> tuple[dict[str, bytes], list[Part], tuple[str, ...]]:
    """All files, the parts that became graphs, and what is lacking."""
    whole, model = model, model.of_mean()  # the walk beside it asks for no more
    stages = stages_of(model.found, model.settings.trust)
    files: dict[str, bytes] = {"walk.json": json.dumps(walk_of(model), indent=1, allow_nan=False).encode()}
    parts, limits = [], [] if model is whole else [MEAN_ALONE]
    for part in (network_of(model), *beside(model, stages)):
        try:
            if part.name == "texts":
                assert stages.texts is not None
                files[WORDS] = stages.texts.words_as_json()
            files |= traced(part)
        except Exception as error:  # the tracers have a dozen kinds of their own, and a network may be the user's
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            said = f"{tracer} cannot trace {type(part.module).__name__}: {reason[:300]}"
            if part.name != "texts":
                raise ConfigError(said) from error
            files.pop(WORDS, None)
            limits.append(f"Without what makes tokens of texts ({said}): they come from `stages_of` of the run.")
            continue
        parts.append(part)
    if stages.texts is not None:
        null = io.BytesIO()
        np.save(null, model.denoiser.null.numpy(), allow_pickle=False)
        files[NULL] = null.getvalue()
    return files, parts, tuple(limits)


def _pt2(part: Part) -> dict[str, bytes]:
    with _quiet():
        program = torch.export.export(part.module, part.arguments, dynamic_shapes=part.shapes)
    data = io.BytesIO()
    torch.export.save(program, data)
    return {f"{part.name}.pt2": data.getvalue()}


def _onnx(part: Part) -> dict[str, bytes]:
    with _quiet(), tempfile.TemporaryDirectory() as place:
        program = torch.onnx.export(
            part.module,
            part.arguments,
            input_names=list(part.inputs),
            output_names=[part.output],
            dynamic_shapes=part.shapes,
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # it is None for the older exporter alone
        program.save(Path(place) / f"{part.name}.onnx")
        return {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}


def _signature(model: Model, parts: list[Part], end: str) -> str:
    network = network_of(model)
    of = {name: list(value.shape[1:]) for name, value in network.inputs.items()}
    if network.length:
        of["tokens"][0] = "L"
    kinds = {"labels": "int64"}
    said = ", ".join(f"{n} [{', '.join(map(str, ('B', *shape)))}] {kinds.get(n, 'float32')}" for n, shape in of.items())
    hint = " (x: the picture's channels, then those of the x0 foreseen before)" if model.denoiser.network.hint_channels else ""
    moves = len(walk_of(model)["moves"])
    lines = [f"`F = network({', '.join(of)})` for {_batch(parts[0])}: {said}{hint}."]
    if network.length:
        lines.append(
            f"Tokens are those of the run's text encoder, L of them, at most {network.length}; a token of zeros is padding. "
            f"`{NULL}` [{network.length}, {network.inputs['tokens'].shape[2]}] has those of the empty text."
        )
    for part in parts[1:]:
        kinds = {"ids": " int64", "mask": " bool"}
        shapes = [f"{n} [{', '.join(map(str, ('B', *v.shape[1:])))}]{kinds.get(n, '')}" for n, v in part.inputs.items()]
        lines.append(f"`{part.name}.{end}`: {part.output} = {part.name}({', '.join(shapes)}), for {_batch(part)}.")
    made = "latents" if model.diffused != model.shape else "pictures"
    lines.append(f"""`walk.json` has the numbers that turn F into {made}: {moves} moves of Euler's rule from noise
to data, each with what the network is told (`time`), the factor on its input (`c_in`), and how x0 and the next x follow.""")
    return "\n".join(lines)


def _batch(part: Part) -> str:
    return "any batch B" if part.largest is None else f"a batch B of up to {part.largest}"


def _tokenizers(parts: list[Part]) -> str:
    return "from tokenizers import Tokenizer\n" if any(part.name == "texts" for part in parts) else ""


def _saving(model: Model) -> str:
    mode = "pictures[0, 0]" if model.shape[0] == 1 else "pictures[0].transpose(1, 2, 0)"
    return f'Image.fromarray({mode}).save("picture.png")'


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracers' remarks about themselves."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
