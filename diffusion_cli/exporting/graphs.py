"""to=torch_export and to=onnx: the network as a graph, F = network(x, time, labels), for any batch, without this package.

What is around it, the schedule and the prediction, is in walk.json as numbers (moves.py). Both graphs are traced by
torch.export; a network that it cannot trace is refused with its reason.
"""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting.moves import example, loop, walk_of
from diffusion_cli.exporting.parcel import Model, Parcel

INPUTS = ("x", "time", "labels")


def torch_export(model: Model) -> Parcel:
    """network.pt2: what torch.export.load reads."""
    with _quiet(), _one_line(model, "torch.export"):
        program = torch.export.export(model.denoiser.network, example(model), dynamic_shapes=_dynamic(model))
    data = io.BytesIO()
    torch.export.save(program, data)
    named = ", ".join(["z", "time", *(["labels"] if model.denoiser.network.num_classes else [])])
    use = f"""{_signature(model)}

`network.pt2` is a zip archive: the graph as JSON (`models/model.json`), the weights as bare numbers (`data/weights/`), and the
inputs that it was traced with as a small pickle (`data/sample_inputs/`). `torch.export.load` may unpickle parts of such an
archive: load no .pt2 from a source that you do not trust.

```python
import json
from pathlib import Path
import torch
from PIL import Image

network = torch.export.load("network.pt2").module()
walk = json.loads(Path("walk.json").read_text())
with torch.no_grad():
{_indented(loop(model, f"network({named})", "torch"))}
pictures = ((x.clip(-1, 1) + 1) * 127.5).round().byte().numpy()
{_saving(model)}
```"""
    return Parcel({"network.pt2": data.getvalue(), "walk.json": _walk(model)}, use, "pytorch", ("torch-export",))


def onnx(model: Model) -> Parcel:
    """network.onnx: what onnxruntime and others read; weights of more than 2 GB lie beside it."""
    arguments = example(model)
    names = list(INPUTS[: len(arguments)])
    with _quiet(), _one_line(model, "torch.onnx"), tempfile.TemporaryDirectory() as place:
        program = torch.onnx.export(
            model.denoiser.network,
            arguments,
            input_names=names,
            output_names=["F"],
            dynamic_shapes=_dynamic(model),
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # it is None for the older exporter alone
        program.save(Path(place) / "network.onnx")
        files = {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}
    fed = ", ".join(f'"{name}": {"z" if name == "x" else name}' for name in names)
    use = f"""{_signature(model)}

With `pip install onnxruntime pillow`:

```python
import json
from pathlib import Path
import numpy as np
import onnxruntime
from PIL import Image

network = onnxruntime.InferenceSession("network.onnx")
walk = json.loads(Path("walk.json").read_text())
{loop(model, f"network.run(None, {{{fed}}})[0]", "numpy")}
pictures = ((x.clip(-1, 1) + 1) * 127.5).round().astype("uint8")
{_saving(model)}
```"""
    return Parcel({**files, "walk.json": _walk(model)}, use, "onnx", ("onnx",))


def _dynamic(model: Model) -> tuple[dict[int, object], ...]:
    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} for _ in example(model))


def _walk(model: Model) -> bytes:
    return json.dumps(walk_of(model), indent=1, allow_nan=False).encode()


def _signature(model: Model) -> str:
    x, *_ = example(model)
    shape = ", ".join(map(str, x.shape[1:]))
    hint = " (the picture's channels, then those of the x0 foreseen before)" if model.denoiser.network.hint_channels else ""
    labels = ", labels [B] int64" if model.denoiser.network.num_classes else ""
    names, moves = ", ".join(INPUTS[: len(example(model))]), len(walk_of(model)["moves"])
    return f"""`F = network({names})` for any batch B: x [B, {shape}] float32{hint}, time [B] float32{labels}.
`walk.json` has the numbers that turn F into pictures: {moves} moves of Euler's rule from noise to data, each with what the
network is told (`time`), the factor on its input (`c_in`), and how x0 and the next x follow."""


def _saving(model: Model) -> str:
    mode = "pictures[0, 0]" if model.shape[0] == 1 else "pictures[0].transpose(1, 2, 0)"
    return f'Image.fromarray({mode}).save("picture.png")'


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


@contextlib.contextmanager
def _one_line(model: Model, tracer: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # the tracers have a dozen kinds of their own, and a network may be the user's
        name = type(model.denoiser.network).__name__
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{tracer} cannot trace {name}: {reason[:300]}") from error


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
