"""What model.json says about a model. docs/model-json.md documents it."""

import inspect
import json
import math

from sag_export.mistake import Mistake

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Schedulers of networks with a table of noise levels. They differ only in how they sample, and
# sag-sample decides that.
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
FLOW = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
EDM = {"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"}
# The predictions, and the constants that model.json takes with each. The command refuses others;
# tests/export_model_test.py compares the two.
TABLE = ("beta_start", "beta_end", "beta_schedule", "timesteps", "zero_terminal_snr")
CONSTANTS = {
    "eps": TABLE,
    "v": TABLE,
    "x0": TABLE,
    "edm": ("sigma_data", "sigma_min", "sigma_max"),
    "flow": ("shift", "timestep_multiplier"),
}


def from_scheduler(config, note, given=None):
    """The prediction and its constants from a scheduler_config.json.

    given: the prediction, instead of the scheduler's. Its constants still come from the scheduler.
    note: note(text) tells the user something."""
    prediction = given or predicted(config)
    if config.get("_class_name") in EDM and prediction != "edm":
        raise Mistake(
            "Networks of an EDM scheduler are told the noise level's logarithm, which only edm "
            "gives them. For another prediction give the UNet's own folder."
        )
    if prediction == "flow":
        constants = from_flow(config, note)
    elif prediction == "edm":
        constants = from_edm(config)
    elif config.get("_class_name") in DISCRETE:
        constants = from_table(config)
    else:
        constants = {}
        note(
            f"the scheduler, {config.get('_class_name')}, tells no table of noise levels that is "
            "known here, so Stable Diffusion's is used; --constant sets another"
        )
    return {"prediction": prediction, **constants}


def predicted(config):
    """What the scheduler says that the network predicts."""
    kind, predicted = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if kind in FLOW or predicted == "flow_prediction":
        return "flow"
    if kind in EDM:
        if predicted != "epsilon":
            raise Mistake(
                f'An EDM scheduler\'s "prediction_type" must be epsilon, got {predicted}.'
            )
        return "edm"
    if kind not in DISCRETE:
        raise Mistake(
            f"The pipeline's scheduler, {kind}, is not known; give --prediction and its --constant."
        )
    if predicted not in PREDICTIONS:
        raise Mistake(
            f'The scheduler\'s "prediction_type" must be one of {", ".join(PREDICTIONS)}, '
            f"got {predicted}."
        )
    return PREDICTIONS[predicted]


def from_flow(config, note):
    if config.get("use_dynamic_shifting"):
        note(
            "this scheduler's shift depends on the picture's size, but model.json holds a single "
            "one; sag-sample's --shift sets another"
        )
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return {"shift": shift, "timestep_multiplier": config.get("num_train_timesteps", 1000)}


def from_edm(config):
    defaults = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    return {
        key: value if config.get(key) is None else config[key] for key, value in defaults.items()
    }


def from_table(config):
    config = {**defaults_of(config["_class_name"]), **config}
    if config.get("timestep_type", "discrete") != "discrete":
        raise Mistake(
            f'The scheduler\'s "timestep_type" must be discrete, got {config["timestep_type"]}: '
            "such a network is told the logarithm of the noise level, and not its place in a table."
        )
    if config.get("trained_betas") is not None:
        raise Mistake(
            'The scheduler must have betas by a rule, but it lists them ("trained_betas").'
        )
    if config["beta_schedule"] not in ("linear", "scaled_linear"):
        raise Mistake(
            'The scheduler\'s "beta_schedule" must be linear or scaled_linear, '
            f"got {config['beta_schedule']}."
        )
    return {
        **{key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")},
        "timesteps": config["num_train_timesteps"],
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }


def defaults_of(kind):
    """What diffusers uses for keys that a configuration lacks: every scheduler class has its
    own."""
    import diffusers

    # If a library is missing that the scheduler needs, diffusers puts a class without parameters in
    # its place.
    table = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
    }
    if kind == "DPMSolverSDEScheduler":
        table.update(beta_start=0.00085, beta_end=0.012)
    parameters = inspect.signature(getattr(diffusers, kind, object).__init__).parameters
    return {
        key: parameters[key].default if key in parameters else value for key, value in table.items()
    }


def with_constants(prediction, constants):
    """`prediction`: of from_scheduler. `constants`: "key=value" of --constant."""
    prediction = dict(prediction)
    known = CONSTANTS[prediction["prediction"]]
    for constant in constants:
        key, _, text = constant.partition("=")
        if key not in known:
            raise Mistake(
                f"--constant must name one of {', '.join(known)} for {prediction['prediction']} "
                f'models, got "{key}".'
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
        good = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and value > 0
        )
        good = good and (key != "timesteps" or isinstance(value, int))
    if not good:
        raise Mistake(f'--constant {key} cannot be "{text}".')


def inputs_of(network):
    """What the network takes beside the latent, text and sizes."""
    inputs = {}
    if network.concat:
        concat = network.concat
        inputs["concat"] = {"channels": concat.channels}
        if concat.kind:
            inputs["concat"]["kind"] = concat.kind
        if concat.scale != 1:
            inputs["concat"]["scale"] = concat.scale
    if network.classes is not None:
        inputs["class_labels"] = {"classes": network.classes} if network.classes else {}
    if network.guidance:
        inputs["timestep_cond"] = {"size": network.guidance}
    return inputs


def model_json(name, prediction, network, site, files, multiple):
    description = {
        "format": 1,
        "name": name,
        **prediction,
        "sample": {"shape": list(network.shape), "multiple": multiple},
        "site": site,
        "files": files,
    }
    if inputs := inputs_of(network):
        description["inputs"] = inputs
    if network.guidance:
        # Guidance was distilled into it.
        description["defaults"] = {"cfg": 1.0}
    return json.dumps(description, indent=2) + "\n"
