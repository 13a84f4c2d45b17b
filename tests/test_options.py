"""A node of a config is named by the option that a user would type for it."""

import pytest
from tiny import compose

from diffusion_cli.config import TRAIN_GROUPS
from diffusion_cli.options import CONFIGS, named, option_of

OPTIONS = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in TRAIN_GROUPS}
GIVEN = {"folder": ("dataset.path=x",), "parquet": ("dataset.path=x",), "hub": ("dataset.repo=a/b",)}


@pytest.mark.parametrize("number", range(max(map(len, OPTIONS.values()))))
def test_every_option_is_named(number: int) -> None:
    """One of each group at a time."""
    chosen = {group: options[number % len(options)] for group, options in OPTIONS.items()}
    node = compose(*(f"{group}={option}" for group, option in chosen.items()), *GIVEN.get(chosen["dataset"], ()))
    assert {group: option_of(group, node[group]) for group in chosen} == chosen


@pytest.mark.parametrize("option", [path.stem for path in (CONFIGS / "sampler" / "grid").glob("*.yaml")])
def test_parts_are_named(option: str) -> None:
    words = ["sampler.grid.at=[1,0.5]"] if option == "listed" else []
    node = compose("sampler=heun", f"sampler/grid={option}", *words)
    assert named(node)["sampler"]["grid"]["_target_"] == option and named(node)["sampler"]["_target_"] == "heun"


def test_changed_values_keep_the_name() -> None:
    assert named(compose("optimizer=adamw", "optimizer.lr=1e-3"))["optimizer"]["_target_"] == "adamw"
    node = named(compose("sampler=ddpm", "sampler.steps=7", "sampler.clip=false", "model=unet_attn", "model.width=64"))
    assert (node["sampler"]["_target_"], node["model"]["_target_"]) == ("ddpm", "unet_attn")


def test_a_class_of_somebody_else_has_its_own_name() -> None:
    assert option_of("schedule", {"_target_": "mine.Spiral", "turns": 3}) == "spiral"
    assert named({"../../x": {"_target_": "mine.Spiral"}}) == {"../../x": {"_target_": "spiral"}}
