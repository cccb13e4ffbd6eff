"""What model.json says of a model; examples/sample/model_directory.h documents it."""

import json
import math

from export.mistake import Mistake

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Schedulers of networks with a table of noise levels. They differ in how they sample, which sag-sample decides.
DISCRETE = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
EDM = {"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"}
# Which constants model.json takes beside which prediction.
TABLE = ("beta_start", "beta_end", "beta_schedule", "timesteps", "zero_terminal_snr")
CONSTANTS = {
    "eps": TABLE,
    "v": TABLE,
    "x0": TABLE,
    "edm": ("sigma_data", "sigma_min", "sigma_max"),
    "flow": ("shift", "timestep_multiplier"),
}


def from_scheduler(config, note):
    """The prediction and its constants from a scheduler_config.json. note(text) tells the user something."""
    kind = config.get("_class_name")
    if kind in FLOW or config.get("prediction_type") == "flow_prediction":
        if config.get("use_dynamic_shifting"):
            note(
                "this scheduler shifts noise levels by the picture's size, but model.json holds one; sag-sample's "
                "--shift sets another"
            )
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return {"prediction": "flow", "shift": shift, "timestep_multiplier": config.get("num_train_timesteps", 1000)}
    if kind in EDM:
        return from_edm(config)
    if kind not in DISCRETE:
        raise Mistake(
            f"The pipeline's scheduler, {kind}, is not known; export the UNet's folder alone and give --prediction."
        )
    return from_table(config)


def from_edm(config):
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise Mistake(f'An EDM scheduler\'s "prediction_type" must be epsilon, got {config["prediction_type"]}.')
    defaults = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    return {"prediction": "edm", **{key: config.get(key, value) for key, value in defaults.items()}}


def from_table(config):
    predicted = config.get("prediction_type", "epsilon")
    if predicted not in PREDICTIONS:
        raise Mistake(f'The scheduler\'s "prediction_type" must be one of {", ".join(PREDICTIONS)}, got {predicted}.')
    if config.get("trained_betas") is not None:
        raise Mistake('The scheduler must have betas by a rule, but it lists them ("trained_betas").')
    schedule = config.get("beta_schedule", "linear")
    if schedule not in ("linear", "scaled_linear"):
        raise Mistake(f'The scheduler\'s "beta_schedule" must be linear or scaled_linear, got {schedule}.')
    return {
        "prediction": PREDICTIONS[predicted],
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "beta_schedule": schedule,
        "timesteps": config.get("num_train_timesteps", 1000),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }


def with_constants(prediction, constants):
    """`prediction`: of from_scheduler. `constants`: "key=value" of --constant."""
    prediction = dict(prediction)
    known = CONSTANTS[prediction["prediction"]]
    for constant in constants:
        key, _, text = constant.partition("=")
        if key not in known:
            raise Mistake(
                f'--constant must name one of {", ".join(known)} for {prediction["prediction"]} models, got "{key}".'
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        check_constant(key, value, text)
        prediction[key] = value
    return prediction


def check_constant(key, value, text):
    if key == "beta_schedule":
        good = value in ("linear", "scaled_linear")
    elif key == "zero_terminal_snr":
        good = isinstance(value, bool)
    else:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        good = good and (key != "timesteps" or isinstance(value, int))
    if not good:
        raise Mistake(f'--constant {key} cannot be "{text}".')


def model_json(name, prediction, network, site, files, multiple):
    description = {
        "format": 1,
        "name": name,
        **prediction,
        "sample": {"shape": list(network.shape), "multiple": multiple},
        "site": site,
        "files": files,
    }
    return json.dumps(description, indent=2) + "\n"
