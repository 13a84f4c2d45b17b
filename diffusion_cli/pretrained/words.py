"""Words that our schedules and predictions share with the schedulers of diffusers: read here, written by exporting/."""

from diffusion_cli.predictions import X0, Eps, Prediction, V

TYPES: dict[type[Prediction], str] = {Eps: "epsilon", V: "v_prediction", X0: "sample"}  # ours -> theirs
CURVES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}  # those that DDIMScheduler has
