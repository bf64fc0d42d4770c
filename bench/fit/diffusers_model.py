"""Models of diffusers by their config.json: read, built, called, and the inputs of a training step.

    UNet2DModel             predicts the noise of an image at a time, for a class where it has some
    UNet2DConditionModel    the same for a text of 77 tokens, and SDXL's sizes where it takes them
    AutoencoderKL           reconstructs an image from a sample of its posterior

diffusers is imported where such a model is planned, and is needed nowhere else.
"""

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from resblock_bench.bench import files
from resblock_bench.bench.errors import UsageError, first_line, shortened, unknown

Config = dict[str, Any]

CLASSES = ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL")
_FILE_BYTES = 2**20
_TOKENS = 77  # of CLIP's text encoders
_SIZES = 6  # of an image and its crop, which SDXL embeds
_BOUNDS = {
    "sample_size": 8192,
    "layers_per_block": 64,
    "transformer_layers_per_block": 64,
    "block_out_channels": 65536,
}
_MOST = 2**24  # of any other number
_LEVELS = 12
_ADDITIONS = (None, "text", "text_time")
_CLASS_KINDS = (None, "timestep", "projection", "simple_projection")


def read_config(given: str) -> Config:
    """The configuration of a model that can be built and run. Raises UsageError."""
    config = _parsed(given)
    kind = config.get("_class_name")
    if kind not in CLASSES:
        found = (
            f"a {shortened(str(kind))}" if kind else "no model of diffusers, lacking _class_name"
        )
        raise UsageError(f"{given} describes {found}, and {', '.join(CLASSES)} are planned")
    if importlib.util.find_spec("diffusers") is None:
        raise UsageError(
            f"{given} describes a model of diffusers, which is not installed: pip install diffusers"
        )
    try:
        known = inspect.signature(_class(config).__init__).parameters
    except Exception as error:  # whatever a foreign import raises
        raise UsageError(
            f"{given} needs diffusers, which cannot be imported: {first_line(error)}; mend it"
        ) from None
    names = [name for name in known if name != "self"]
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in own:
        if key not in names:
            raise unknown(f"key in {given}:", key, names)
    try:
        for key, value in own.items():
            _check_size(given, key, value)
        _check_inputs(given, config)
        with torch.device("meta"):
            inputs = draw_inputs(config, 1)
            target = inputs.pop("target")
            shape = call(build_model(config), inputs).shape
    except UsageError:
        raise
    except Exception as error:  # whatever diffusers raises for sizes that do not fit each other
        raise UsageError(f"{given} describes no model that runs: {first_line(error)}") from None
    if shape != target.shape:
        raise UsageError(
            f"{given} describes a model that gives {tuple(shape)} for an image of "
            f"{tuple(target.shape)}: set sample_size to a multiple of "
            f"{2 ** (len(_with_defaults(config)['block_out_channels']) - 1)}"
        )
    return config


def _parsed(given: str) -> Config:
    try:
        config: Config = msgspec.json.decode(files.read(Path(given), _FILE_BYTES), type=Config)
    except OSError as error:
        raise UsageError(f"cannot read {given}: {error.strerror}; check the path") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{given} is no configuration in JSON: {error}; mend it") from None
    return config


def _check_size(given: str, key: str, value: object) -> None:
    """Raises UsageError for a number that nobody trains with: far above, nothing ends."""
    most = _BOUNDS.get(key, _MOST)
    if isinstance(value, list):
        if len(value) > _LEVELS:
            raise UsageError(f"{given}: {key} has {len(value)} values, and at most {_LEVELS} fit")
        for item in value:
            _check_size(given, key, item)
    elif isinstance(value, int | float) and abs(value) > most:
        raise UsageError(f"{given}: {key} is {value}, and at most {most} is planned")


def _check_inputs(given: str, config: Config) -> None:
    """Raises UsageError for a model whose inputs are not known here."""
    full = _with_defaults(config)
    if not isinstance(full["sample_size"], int) and not _is_pair(full["sample_size"]):
        raise UsageError(
            f"{given} has no sample_size that is an integer or two of them: write the size of its "
            "images into it"
        )
    allowed: dict[str, tuple[str | None, ...]] = {
        "addition_embed_type": _ADDITIONS,
        "class_embed_type": _CLASS_KINDS,
        "encoder_hid_dim_type": (None, "text_proj"),
    }
    for key, values in allowed.items():
        if full.get(key) not in values:
            names = ", ".join("null" if value is None else value for value in values)
            raise UsageError(f"{given}: {key} is {full[key]!r}, and {names} are planned")
    if isinstance(full.get("cross_attention_dim"), list | tuple):
        raise UsageError(f"{given}: cross_attention_dim has several values, and one is planned")


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(side, int) for side in value)
    )


def build_model(config: Config) -> nn.Module:
    """On the default device, in training mode."""
    with _quiet():
        model: nn.Module = _class(config).from_config(config)
    return model.train()


def call(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's prediction, or reconstruction."""
    arguments: dict[str, Any] = dict(inputs)
    added = {name: arguments.pop(name) for name in ("text_embeds", "time_ids") if name in arguments}
    if added:
        arguments["added_cond_kwargs"] = added
    if "timestep" not in arguments:
        arguments["sample_posterior"] = True
    out: Tensor = model(**arguments, return_dict=False)[0]
    return out


def draw_inputs(config: Config, batch: int) -> dict[str, Tensor]:
    """A batch of zeros as `call` takes it, and "target" for the loss; on the default device."""
    full = _with_defaults(config)
    size = full["sample_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    found = {"sample": torch.zeros(batch, full["in_channels"], *sides)}
    if config["_class_name"] != "AutoencoderKL":
        found["timestep"] = torch.zeros(batch)
        if (labels := _class_labels(full, batch)) is not None:
            found["class_labels"] = labels
    if config["_class_name"] == "UNet2DConditionModel":
        width = full["encoder_hid_dim"] or full["cross_attention_dim"]
        found["encoder_hidden_states"] = torch.zeros(batch, _TOKENS, width)
        if full["addition_embed_type"] == "text_time":
            times = _SIZES * full["addition_time_embed_dim"]
            pooled = full["projection_class_embeddings_input_dim"] - times
            found["text_embeds"] = torch.zeros(batch, pooled)
            found["time_ids"] = torch.zeros(batch, _SIZES)
    found["target"] = torch.zeros(batch, full["out_channels"], *sides)
    return found


def _class_labels(full: Config, batch: int) -> Tensor | None:
    kind = full["class_embed_type"]
    if kind == "timestep":
        return torch.zeros(batch)
    if kind is not None:
        return torch.zeros(batch, full["projection_class_embeddings_input_dim"])
    if full["num_class_embeds"] is not None:
        return torch.zeros(batch, dtype=torch.int64)
    return None


def _with_defaults(config: Config) -> Config:
    parameters = inspect.signature(_class(config).__init__).parameters.values()
    return {**{p.name: p.default for p in parameters if p.name != "self"}, **config}


def _class(config: Config) -> Any:
    with _quiet():
        return getattr(importlib.import_module("diffusers"), config["_class_name"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers says of optional packages and of its own defaults."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
