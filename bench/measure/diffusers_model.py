"""Models of diffusers by their config.json: read, built, called, and the inputs of a training step.

    UNet2DModel             predicts the noise of an image at a time, for a class where it has some
    UNet2DConditionModel    the same for a text of 77 tokens, and SDXL's sizes where it takes them
    AutoencoderKL           reconstructs an image from a sample of its posterior

A configuration comes from outside: it is JSON, its keys are those of the class, its numbers are
bounded, and it is built and run without data before anything is made of it. diffusers is imported
where there is such a model, and is needed nowhere else.
"""

import functools
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from resblock_bench.bench import files
from resblock_bench.bench.errors import UsageError, first_line, shortened, unknown
from resblock_bench.bench.records import config_name

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
    """The configuration in a file, of a model that can be built and run. Raises UsageError."""
    try:
        content = files.read(Path(given), _FILE_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read {given}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise UsageError(f"{given} is no configuration in JSON: {error}; mend it") from None
    return _checked(given, content)


@functools.cache
def checked(text: str) -> Config:
    """The configuration in a text that `as_text` made, by whoever. Raises UsageError."""
    return _checked("the configuration", text.encode())


def as_text(config: Config) -> str:
    """All of a configuration that a model is built from, in one way."""
    kept = {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
    return msgspec.json.encode(kept, order="sorted").decode()


class MeasuredSizes(Struct, frozen=True):
    """A model whose steps can be measured.

    name, text   as a cell has them
    side         of its square images
    modulated    whether its blocks scale and shift; else they add their embedding
    """

    name: str
    text: str
    side: int
    in_channels: int
    out_channels: int
    emb_channels: int
    modulated: bool
    dropout: float


def measured_sizes(given: str, config: Config) -> MeasuredSizes:
    """Those of a configuration from `given`. Raises UsageError for a model that is not measured."""
    kind, full, text = config["_class_name"], _with_defaults(config), as_text(config)
    if kind == "AutoencoderKL":
        raise UsageError(
            f"{given} describes an AutoencoderKL, whose step draws from its posterior, differently "
            "in every precision: it is planned, and not measured; give a UNet"
        )
    height, width = _sides(full)
    if height != width:
        raise UsageError(f"{given}: sample_size is {height} by {width}: square images are measured")
    dropout = full.get("dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UsageError(f"{given}: dropout is {dropout!r}: it is measured from 0 to below 1")
    return MeasuredSizes(
        name=config_name(kind, text),
        text=text,
        side=height,
        in_channels=full["in_channels"],
        out_channels=full["out_channels"],
        emb_channels=full.get("time_embedding_dim") or 4 * full["block_out_channels"][0],
        modulated=full["resnet_time_scale_shift"] == "scale_shift",
        dropout=float(dropout),
    )


def missing() -> str | None:
    """Why no model of diffusers can be built here, or None."""
    if importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed: pip install diffusers"
    return None


def version() -> dict[str, str]:
    """diffusers', by its name."""
    try:
        return {"diffusers": metadata.version("diffusers")}
    except metadata.PackageNotFoundError:
        return {}


def _checked(given: str, content: bytes) -> Config:
    """`given` says where it is from."""
    try:
        config: Config = msgspec.json.decode(content, type=Config)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{given} is no configuration in JSON: {error}; mend it") from None
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
        with unset_fake_temporarily(), torch.device("meta"):
            inputs = draw_inputs(config, 1)
            target = inputs.pop("target")
            model = build_model(config)
            shape = call(model, inputs).shape
    except UsageError:
        raise
    except Exception as error:  # whatever diffusers raises for sizes that do not fit each other
        raise UsageError(f"{given} describes no model that runs: {first_line(error)}") from None
    for name, _ in model.named_buffers():
        raise UsageError(
            f"{given} describes a model with constants beside its weights ({name}), and such ones "
            "are not made here: take other blocks"
        )
    if shape != target.shape:
        raise UsageError(
            f"{given} describes a model that gives {tuple(shape)} for an image of "
            f"{tuple(target.shape)}: set sample_size to a multiple of "
            f"{2 ** (len(_with_defaults(config)['block_out_channels']) - 1)}"
        )
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


def build_model(config: Config, *, checkpoint: bool = False) -> nn.Module:
    """On the default device, in training mode.

    checkpoint   with diffusers' own gradient checkpointing, of whole blocks of the model
    """
    with _quiet():
        model = _class(config).from_config(config)
    if checkpoint:
        model.enable_gradient_checkpointing()
    built: nn.Module = model.train()
    return built


@functools.cache
def activation_elements(text: str) -> int:
    """What comes in and out of all residual blocks of a model, for an image."""
    found: list[int] = []
    config = checked(text)
    with unset_fake_temporarily(), torch.device("meta"), torch.no_grad():
        model, inputs = build_model(config), draw_inputs(config, 1)
        del inputs["target"]
        for module in model.modules():
            if type(module).__name__.startswith("ResnetBlock"):
                module.register_forward_hook(
                    lambda _, given, out: found.append(given[0].numel() + out.numel())
                )
        call(model, inputs)
    return sum(found)


def autoencoded(model: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Of an AutoencoderKL: what it makes of a sample of an image's posterior, and how far the
    posterior is from a normal one, the mean over the images of its divergence."""
    posterior = model.encode(image, return_dict=False)[0]
    out: Tensor = model.decode(posterior.sample(), return_dict=False)[0]
    return out, posterior.kl().mean()


def call(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
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
    sides = _sides(full)
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


def _sides(full: Config) -> tuple[int, int]:
    """Height and width of its images."""
    size = full["sample_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


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
