"""A scheduler of diffusers in our words: its schedule, what its network foresees, and its own walk.

    theirs                                          schedule                        prediction
    num_train_timesteps, beta_*, trained_betas      Betas, Tabulated                prediction_type: Eps, X0, V
    FlowMatch...                                    Flow (its shift is a grid's)    Velocity
    EDM...                                          EDM                             Preconditioned
    ScoreSdeVe                                      VE, twice as strong             UnitScore

A scheduler there is three things at once; here the walk is only the sampler that is taken when none is named. What it lacks of
theirs: dynamic thresholding, and walks that stop at the first index (set_alpha_to_one false): ours end in clean data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_cli.errors import ConfigError
from diffusion_cli.pretrained.words import CURVES, TYPES

Node = dict[str, Any]
Config = Mapping[str, Any]

_NAMED = {**{theirs: ours for ours, theirs in CURVES.items()}, "sigmoid": "sigmoid", "laplace": "laplace"}
_FORESEEN = {word: f"{kind.__module__}.{kind.__name__}" for kind, word in TYPES.items()}
_SPACINGS = {"leading": "Leading", "linspace": "Linspace", "trailing": "Trailing"}
_SAMPLERS = "diffusion_cli.samplers."
_SCHEDULES = "diffusion_cli.schedules."
_PREDICTIONS = "diffusion_cli.predictions."
_VARIANCES = {"fixed_large": "large", "fixed_large_log": "large", "learned_range": "learned"}  # small for all others


@dataclass(frozen=True)
class Process:
    """Nodes as a run's config has them."""

    schedule: Node
    prediction: Node
    sampler: Node

    def walked(self, varied: bool) -> Node:
        """The sampler of a network that says a variance too, or of one that does not."""
        learned = self.sampler.get("variance") == "learned"
        return {**self.sampler, "variance": "small"} if learned and not varied else self.sampler


def process_of(config: Config, place: str) -> Process:
    """config: a scheduler_config.json. place: whose, for messages. Raises ConfigError for what has no counterpart here."""
    name = str(config.get("_class_name"))
    if name not in _READERS:
        raise ConfigError(f"{place}: its {name} is none that is read here: {', '.join(_READERS)}")
    return _READERS[name](config, place)


# -- tables of betas ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walk:
    """rule: the sampler's node but for clip and grid. spacing, clip: what that scheduler does where its config is silent."""

    rule: Callable[[Config], Node]
    spacing: str = "linspace"
    clip: bool = False

    def __call__(self, config: Config, place: str) -> Process:
        if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            return _flow_process(self.rule(config), config.get("flow_shift", 1.0))
        schedule, size = _table(config, place)
        word = str(config.get("prediction_type", "epsilon"))
        if word not in _FORESEEN:
            raise ConfigError(
                f"{place}: prediction_type is {word}, and {', '.join(_FORESEEN)} and flow_prediction are read here"
            )
        if word == "epsilon" and schedule["zero_terminal_snr"]:
            raise ConfigError(
                f"{place}: its schedule ends in pure noise (rescale_betas_zero_snr) and its network foresees the noise "
                "(prediction_type epsilon): at the first step no picture can be read off that"
            )
        rule = self.rule(config)
        clip = bool(config.get("clip_sample", self.clip))
        grid = _grid(config, str(config.get("timestep_spacing", self.spacing)), size)
        return Process(
            schedule, {"_target_": _FORESEEN[word]}, {**rule, "steps": min(rule["steps"], size), "clip": clip, "grid": grid}
        )


def _table(config: Config, place: str) -> tuple[Node, int]:
    """The schedule and its number of knots."""
    betas, zero = config.get("trained_betas"), bool(config.get("rescale_betas_zero_snr", False))
    if betas is not None:
        # A table that begins with 0 has clean data at index 0, where no walk asks: what is left is told from 1 on.
        told_first = int(betas[0] == 0)
        kept = list(betas[told_first:])
        return {
            "_target_": f"{_SCHEDULES}Tabulated",
            "betas": kept,
            "told_first": told_first,
            "zero_terminal_snr": zero or kept[-1] == 1,
        }, len(kept)
    curve, size = str(config.get("beta_schedule", "linear")), int(config.get("num_train_timesteps", 1000))
    if curve not in _NAMED:
        raise ConfigError(f"{place}: beta_schedule is {curve}, and {', '.join(_NAMED)} are read here")
    node = {"_target_": f"{_SCHEDULES}Betas", "curve": _NAMED[curve], "steps": size, "zero_terminal_snr": zero}
    return {**node, "first": config.get("beta_start", 1e-4), "last": config.get("beta_end", 0.02)}, size


def _grid(config: Config, spacing: str, size: int) -> Node:
    if config.get("use_karras_sigmas"):  # between the ends of the table: the grid cuts the upper one itself
        first = (config.get("trained_betas") or [config.get("beta_start", 1e-4)])[0]
        return {"_target_": f"{_SAMPLERS}Karras", "sigma_min": (first / (1 - first)) ** 0.5, "sigma_max": 1e4, "rho": 7.0}
    if config.get("use_beta_sigmas"):
        return {"_target_": f"{_SAMPLERS}Beta"}
    shifted = {"offset": int(config.get("steps_offset", 0))} if spacing == "leading" else {}
    return {"_target_": _SAMPLERS + _SPACINGS.get(spacing, "Leading"), "table": size, **shifted}


# -- rules of walks ----------------------------------------------------------------------------------------------------


def _rule(name: str, steps: int, **keys: Any) -> Callable[[Config], Node]:
    return lambda config: {"_target_": _SAMPLERS + name, "steps": steps, **keys}


def _ddpm(config: Config) -> Node:
    variance = _VARIANCES.get(str(config.get("variance_type")), "small")
    return {"_target_": f"{_SAMPLERS}Ancestral", "steps": 1000, "eta": 1.0, "variance": variance}


def _pndm(config: Config) -> Node:
    warm_up = "heun" if config.get("skip_prk_steps", False) else "runge_kutta"
    return {"_target_": f"{_SAMPLERS}PNDM", "steps": 50, "warm_up": warm_up}


def _dpm(config: Config) -> Node:
    kind = str(config.get("algorithm_type", "dpmsolver++"))
    slope = "exact" if config.get("solver_type") == "heun" else "midpoint"
    frame, eta = "data" if "++" in kind else "noise", float(kind.startswith("sde"))
    order = min(int(config.get("solver_order", 2)), 3)
    third = {"slope": "exact", "curvature": "half"} if order == 3 else {"slope": slope}
    return {
        **_MULTISTEP,
        "frame": frame,
        "order": order,
        "eta": eta,
        "taper": bool(config.get("lower_order_final", True)),
        **third,
    }


def _unipc(config: Config) -> Node:
    order = min(int(config.get("solver_order", 2)), 3)
    keys = {"corrector": order + 1, "slope": "midpoint" if config.get("solver_type") != "bh1" else "bh1", "taper": True}
    return {**_MULTISTEP, "frame": "data" if config.get("predict_x0", True) else "noise", "order": order, **keys}


_MULTISTEP = {"_target_": f"{_SAMPLERS}Multistep", "steps": 50}


# -- straight lines and EDM --------------------------------------------------------------------------------------------


def _flow(name: str) -> Callable[[Config, str], Process]:
    def read(config: Config, place: str) -> Process:
        return _flow_process({"_target_": _SAMPLERS + name, "steps": 50, "eta": 0.0}, config.get("shift", 1.0))

    return read


def _flow_process(rule: Node, shift: float) -> Process:
    own = {"_target_": f"{_SAMPLERS}Uniform"}
    grid = own if shift == 1 else {"_target_": f"{_SAMPLERS}ShiftedGrid", "grid": own, "factor": shift}
    nodes = {"_target_": f"{_SCHEDULES}Flow"}, {"_target_": f"{_PREDICTIONS}Velocity"}
    return Process(*nodes, {**rule, "clip": False, "grid": grid})


def _edm(rule: Callable[[Config], Node]) -> Callable[[Config, str], Process]:
    def read(config: Config, place: str) -> Process:
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ConfigError(f"{place}: prediction_type is {config['prediction_type']}, and EDM's own, epsilon, is read here")
        low, high = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
        rho = config.get("rho", 7.0)
        schedule = {"_target_": f"{_SCHEDULES}EDM", "sigma_min": low, "sigma_max": high, "rho": rho}
        prediction = {"_target_": f"{_PREDICTIONS}Preconditioned", "sigma_data": config.get("sigma_data", 0.5)}
        ends = {"sigma_min": low, "sigma_max": high}
        karras = config.get("sigma_schedule", "karras") == "karras"
        grid = {"_target_": f"{_SAMPLERS}Own"} if karras else {"_target_": f"{_SAMPLERS}Exponential", **ends}
        return Process(schedule, prediction, {**rule(config), "clip": False, "grid": grid})

    return read


def _ve(config: Config, place: str) -> Process:
    """Of pictures in [0, 1]: in ours, [-1, 1], all noise is twice as large."""
    ends = {"sigma_min": 2 * config.get("sigma_min", 0.01), "sigma_max": 2 * config.get("sigma_max", 1348.0)}
    rule = {"steps": 2000, "corrections": config.get("correct_steps", 1), "snr": config.get("snr", 0.15)}
    grid = {"_target_": f"{_SAMPLERS}Uniform"}
    sampler = {"_target_": f"{_SAMPLERS}PredictorCorrector", **rule, "clip": False, "grid": grid}
    return Process({"_target_": f"{_SCHEDULES}VE", **ends}, {"_target_": f"{_PREDICTIONS}UnitScore"}, sampler)


_EULER = _rule("Ancestral", 50, eta=0.0)
_READERS: dict[str, Callable[[Config, str], Process]] = {
    "DDPMScheduler": _Walk(_ddpm, "leading", True),
    "DDIMScheduler": _Walk(_EULER, "leading", True),
    "PNDMScheduler": _Walk(_pndm, "leading"),
    "EulerDiscreteScheduler": _Walk(_EULER),
    "EulerAncestralDiscreteScheduler": _Walk(_rule("Ancestral", 50, eta=1.0)),
    "HeunDiscreteScheduler": _Walk(_rule("Heun", 50, frame="noise")),
    "KDPM2DiscreteScheduler": _Walk(_rule("HalfWay", 50, frame="noise")),
    "KDPM2AncestralDiscreteScheduler": _Walk(_rule("HalfWay", 50, frame="noise", eta=1.0)),
    "LMSDiscreteScheduler": _Walk(_rule("Multistep", 50, frame="noise", clock="frame", order=4)),
    "DPMSolverMultistepScheduler": _Walk(_dpm),
    "DPMSolverSinglestepScheduler": _Walk(_rule("SingleStep", 50)),
    "DEISMultistepScheduler": _Walk(_rule("Multistep", 50, frame="noise", order=3)),
    "UniPCMultistepScheduler": _Walk(_unipc),
    "FlowMatchEulerDiscreteScheduler": _flow("Ancestral"),
    "FlowMatchHeunDiscreteScheduler": _flow("Heun"),
    "EDMEulerScheduler": _edm(_EULER),
    "EDMDPMSolverMultistepScheduler": _edm(_dpm),
    "ScoreSdeVeScheduler": _ve,
}
