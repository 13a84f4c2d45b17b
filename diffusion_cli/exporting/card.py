"""The model card: README.md in the hub's format, a YAML head for machines and Markdown for people, all from the run itself.

Mitchell et al. 2019, "Model cards for model reporting"; the head is written and read by huggingface_hub's own ModelCardData.
"""

from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffusion_cli import __version__
from diffusion_cli.exporting.parcel import Model, Parcel
from diffusion_cli.exporting.story import Figure, Rows, Story

PICTURE = "samples.png"
TASKS = {False: "unconditional-image-generation", True: "text-to-image"}  # by whether texts are read


def card_of(model: Model, story: Story, parcel: Parcel) -> bytes:
    """The whole file; huggingface_hub reads it back."""
    text = f"---\n{_head(story, parcel).to_yaml()}\n---\n\n" + "\n\n".join(_sections(model, story, parcel)) + "\n"
    return str(ModelCard(text)).encode()


def _head(story: Story, parcel: Parcel) -> ModelCardData:
    task = TASKS[story.reads]
    return ModelCardData(
        license=story.licence or "unknown",
        library_name=parcel.library,
        tags=[task, "diffusion", "diffusion-cli", *parcel.tags],
        datasets=[story.dataset] if story.dataset else None,
        base_model=story.base,
        pipeline_tag=task,
        model_name=story.name,
        eval_results=[_result(story, figure) for figure in story.figures] or None,
    )


def _result(story: Story, figure: Figure) -> EvalResult:
    name = dict(story.data)["set"]
    return EvalResult(
        task_type=TASKS[story.reads],
        dataset_type=story.dataset or name.partition(",")[0].lower(),
        dataset_name=name,
        dataset_split=figure.split,
        metric_type=figure.name,
        metric_name=figure.name,
        metric_value=figure.value,
    )


def _sections(model: Model, story: Story, parcel: Parcel) -> Iterator[str]:
    channels, height, width = model.shape
    kind = "a text-to-image" if story.reads else "a class-conditional" if model.facts["taught"] else "an unconditional"
    yield f"# {story.name}"
    yield (
        f"This is {kind} diffusion model of {height} x {width} {'grey' if channels == 1 else 'RGB'} pictures, trained with "
        f"diffusion-cli {__version__} for {story.step:,} steps."
    )
    if story.picture is not None:
        yield f"![samples]({PICTURE})\n\nSamples that the averaged weights drew while training, not chosen."
    brought = "What follows runs in this folder; `hf download OWNER/NAME --local-dir DIR` brings one from the hub."
    yield f"## Use\n\n{brought}\n\n{parcel.use}"
    yield f"## Data\n\n{_table(story.data)}"
    yield f"## Process\n\n{_table(story.process)}"
    yield f"## Network and training\n\n{_table((*story.network, *story.training))}"
    yield f"## Figures\n\n{_figures(story)}"
    yield "## Limits\n\n" + "\n".join(f"- {line}" for line in (*_limits(model, story), *parcel.limits))


def _table(rows: Rows) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _figures(story: Story) -> str:
    if not story.figures:
        return "None was measured for this checkpoint and these weights."
    lines = ["| figure | value | standard error | of | measured on |", "|---|---|---|---|---|"]
    for f in story.figures:
        error = "" if f.error is None else f"{f.error:.2g}"
        lines.append(f"| {_cell(f.name)} | {f.value:.4g} | {error} | {_cell(f.of)} | {_cell(f.how)} |")
    return "\n".join(lines)


def _limits(model: Model, story: Story) -> Iterator[str]:
    yield "It draws what its data shows, with the gaps and leanings of that data, and nothing else."
    yield "Whether samples copy training pictures was not looked at here: `diffusion-sample nearest=5` compares them."
    if not story.figures:
        yield "Nothing was measured of its quality."
    if story.licence is None:
        yield "No licence was stated for these weights, and the terms of the data hold besides."
    if model.facts["taught"] and not model.node["objective"].get("label_dropout"):
        yield "It was always told a class: it cannot be asked without one, nor guided by labels."
