"""The published models: what was trained, and how to build it.

Sources: the README files of improved-diffusion (IDDPM, arXiv:2102.09672) and guided-diffusion
(ADM, arXiv:2105.05233), and table 7 of EDM (arXiv:2206.00364).
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import nn

from . import arguments
from .edm import EDMUNet
from .encoder import EncoderUNetModel
from .unet import SuperResModel, UNetModel

Family = Literal["unet", "super_res", "encoder", "edm_adm", "edm_ddpmpp"]


@dataclass(frozen=True)
class UNetConfig:
    """One model.

    family                   which class it is: UNetModel, SuperResModel, EncoderUNetModel, or
                             EDMUNet in either variant
    image_size               H = W of the (noisy) input
    model_channels           base width
    channel_mult             one multiplier a level
    num_res_blocks           blocks of one encoder level
    attention_resolutions    in pixels, as papers give them (UNetModel takes downsampling rates)
    in_channels, out_channels   of the input image and of the output; out_channels of an encoder
                             are its classes
    num_classes              size of the label embedding, or None
    pool                     of an encoder
    augment_dim              of an EDM network
    train_batch              the batch it was trained with over all devices, where published
    trained_in_fp16          whether it was trained with float16 blocks

    The last two are facts about the published run; build() does not act on them.
    The rest are the arguments of the same names. Raises ValueError or TypeError for what cannot be,
    and for an EDM family with another conditioning, resampling or heads than its network has.
    """

    family: Family
    image_size: int
    model_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float = 0.0
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    num_heads: int = 4
    num_head_channels: int = -1
    use_new_attention_order: bool = False
    in_channels: int = 3
    out_channels: int = 6  # the noise, and a learned variance
    num_classes: int | None = None
    pool: str = "attention"
    augment_dim: int = 0
    train_batch: int | None = None
    trained_in_fp16: bool = False

    def __post_init__(self) -> None:
        arguments.one_of(self, get_args(Family), family=self.family)
        given = vars(self)
        sizes = ["image_size", "model_channels", "num_res_blocks", "in_channels", "out_channels"]
        sizes += [name for name in ("num_classes", "train_batch") if given[name] is not None]
        arguments.integers(self, 1, **{name: given[name] for name in sizes})
        arguments.integers(self, 0, augment_dim=self.augment_dim)
        heads = ("num_heads", "num_head_channels")
        arguments.integers(self, -1, **{name: given[name] for name in heads})
        arguments.multipliers(self, channel_mult=self.channel_mult)
        arguments.integer_collections(self, 1, attention_resolutions=self.attention_resolutions)
        levels = list(dict.fromkeys(self.image_size >> i for i in range(len(self.channel_mult))))
        for size in self.attention_resolutions:
            if size not in levels:
                raise ValueError(
                    f"UNetConfig: attention_resolutions are in pixels, and no level has {size}: "
                    f"of this image_size and channel_mult they have {', '.join(map(str, levels))}"
                )
        arguments.probabilities(self, dropout=self.dropout)
        flags = ("use_scale_shift_norm", "resblock_updown", "use_new_attention_order")
        arguments.flags(self, **{name: given[name] for name in flags})
        if self.family in ("edm_adm", "edm_ddpmpp"):
            adm = self.family == "edm_adm"
            fixed: dict[str, int] = {"use_scale_shift_norm": adm, "resblock_updown": True}
            fixed |= {"num_head_channels": 64} if adm else {"num_heads": 1, "num_head_channels": -1}
            for field, value in fixed.items():
                if getattr(self, field) != value:
                    raise ValueError(
                        f"UNetConfig: family {self.family!r} always has {field}={value}, "
                        f"got {getattr(self, field)!r}"
                    )

    @property
    def emb_channels(self) -> int:
        """E, the width of the timestep embedding that blocks are given."""
        return 4 * self.model_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def attention_rates(self) -> tuple[int, ...]:
        """attention_resolutions as downsampling rates."""
        return tuple(self.image_size // size for size in self.attention_resolutions)


def _iddpm(**changes: Any) -> UNetConfig:
    settings: dict[str, Any] = {"family": "unet", "attention_resolutions": (16, 8)}
    return UNetConfig(**(settings | changes))


def _adm(**changes: Any) -> UNetConfig:
    settings: dict[str, Any] = {
        "family": "unet",
        "attention_resolutions": (32, 16, 8),
        "num_res_blocks": 2,
        "num_head_channels": 64,
        "resblock_updown": True,
        "train_batch": 256,
        "trained_in_fp16": True,
    }
    return UNetConfig(**(settings | changes))


def _classifier(**changes: Any) -> UNetConfig:
    settings = {"family": "encoder", "model_channels": 128, "out_channels": 1000}
    # Whether a classifier ran in float16 was a flag of each run, so it is not claimed here.
    return _adm(**(settings | {"trained_in_fp16": False} | changes))


_MULT_64 = (1, 2, 3, 4)
_MULT_128 = (1, 1, 2, 3, 4)
_MULT_256 = (1, 1, 2, 2, 4, 4)
_MULT_512 = (0.5, 1, 1, 2, 2, 4, 4)

PUBLISHED: MappingProxyType[str, UNetConfig] = MappingProxyType(
    {
        "iddpm-cifar10-uncond": _iddpm(
            image_size=32,
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=3,
            dropout=0.3,
            train_batch=128,
        ),
        "iddpm-imagenet64-uncond": _iddpm(
            image_size=64,
            model_channels=128,
            channel_mult=_MULT_64,
            num_res_blocks=3,
            train_batch=128,
        ),
        "iddpm-imagenet64-cond": _iddpm(
            image_size=64,
            model_channels=192,
            channel_mult=_MULT_64,
            num_res_blocks=3,
            num_classes=1000,
            train_batch=2048,
        ),
        "iddpm-upsample-64-256-cond": _iddpm(
            family="super_res",
            image_size=256,
            model_channels=192,
            channel_mult=_MULT_256,
            num_res_blocks=2,
            num_classes=1000,
            train_batch=256,
        ),
        "iddpm-lsun256-bedroom": _iddpm(
            image_size=256,
            model_channels=128,
            channel_mult=_MULT_256,
            num_res_blocks=2,
            attention_resolutions=(16,),
            num_heads=1,
            use_scale_shift_norm=False,
            train_batch=128,
        ),
        "adm-imagenet64-cond": _adm(
            image_size=64,
            model_channels=192,
            channel_mult=_MULT_64,
            num_res_blocks=3,
            dropout=0.1,
            use_new_attention_order=True,
            num_classes=1000,
            train_batch=2048,
        ),
        "adm-imagenet128-cond": _adm(
            image_size=128,
            model_channels=256,
            channel_mult=_MULT_128,
            num_heads=4,
            num_head_channels=-1,
            num_classes=1000,
        ),
        "adm-imagenet256-cond": _adm(
            image_size=256, model_channels=256, channel_mult=_MULT_256, num_classes=1000
        ),
        "adm-imagenet256-uncond": _adm(image_size=256, model_channels=256, channel_mult=_MULT_256),
        "adm-imagenet512-cond": _adm(
            image_size=512,
            model_channels=256,
            channel_mult=_MULT_512,
            num_classes=1000,
            trained_in_fp16=False,
        ),
        "adm-lsun256": _adm(
            image_size=256, model_channels=256, channel_mult=_MULT_256, dropout=0.1
        ),
        "adm-upsample-64-256": _adm(
            family="super_res",
            image_size=256,
            model_channels=192,
            channel_mult=_MULT_256,
            num_heads=4,
            num_head_channels=-1,
            num_classes=1000,
        ),
        "adm-upsample-128-512": _adm(
            family="super_res",
            image_size=512,
            model_channels=192,
            channel_mult=_MULT_256,
            attention_resolutions=(32, 16),
            num_classes=1000,
        ),
        "adm-classifier64": _classifier(image_size=64, channel_mult=_MULT_64, num_res_blocks=4),
        "adm-classifier128": _classifier(image_size=128, channel_mult=_MULT_128),
        "adm-classifier256": _classifier(image_size=256, channel_mult=_MULT_256),
        "adm-classifier512": _classifier(image_size=512, channel_mult=_MULT_512),
        "edm-imagenet64-adm": _adm(
            family="edm_adm",
            image_size=64,
            model_channels=192,
            channel_mult=_MULT_64,
            num_res_blocks=3,
            dropout=0.1,
            out_channels=3,
            num_classes=1000,
            augment_dim=9,
            train_batch=4096,
        ),
        "edm-cifar10-ddpmpp-cond": UNetConfig(
            family="edm_ddpmpp",
            image_size=32,
            model_channels=128,
            channel_mult=(2, 2, 2),
            num_res_blocks=4,
            attention_resolutions=(16,),
            dropout=0.13,
            use_scale_shift_norm=False,
            resblock_updown=True,
            num_heads=1,
            out_channels=3,
            num_classes=10,
            augment_dim=9,
            train_batch=512,
        ),
        "edm-ffhq64-ddpmpp": UNetConfig(
            family="edm_ddpmpp",
            image_size=64,
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=4,
            attention_resolutions=(16,),
            dropout=0.05,
            use_scale_shift_norm=False,
            resblock_updown=True,
            num_heads=1,
            out_channels=3,
            augment_dim=9,
            train_batch=256,
        ),
    }
)


def published(config_or_name: UNetConfig | str) -> UNetConfig:
    """The config itself, or the published one of that name.

    Raises ValueError that lists the names for a name that is none of them.
    """
    if isinstance(config_or_name, UNetConfig):
        return config_or_name
    if not isinstance(config_or_name, str) or config_or_name not in PUBLISHED:
        raise ValueError(
            f"no published model is called {config_or_name!r}; the names are "
            + ", ".join(PUBLISHED)
        )
    return PUBLISHED[config_or_name]


def build(
    config_or_name: UNetConfig | str, *, use_checkpoint: bool = False, use_fp16: bool = False
) -> nn.Module:
    """The model of a config, freshly initialised on the default device.

    Under ``torch.device("meta")`` nothing is allocated. All models are called as
    ``model(x, timesteps, …)``, followed by ``y`` where there are classes to condition on;
    SuperResModel also takes ``low_res``.
    use_checkpoint   recompute every block in the backward
    use_fp16         the float16 mode of IDDPM and ADM. ValueError for EDM, which has none of this
                     kind: it casts every weight to the dtype of its input.
    """
    c = published(config_or_name)
    arguments.flags("build", use_checkpoint=use_checkpoint, use_fp16=use_fp16)
    if c.family in ("edm_adm", "edm_ddpmpp"):
        if use_fp16:
            raise ValueError(
                f"build: use_fp16 is not available for family {c.family!r}; convert the whole "
                "model with .half(), or use autocast"
            )
        return EDMUNet(
            img_resolution=c.image_size,
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            variant="adm" if c.family == "edm_adm" else "ddpmpp",
            label_dim=c.num_classes or 0,
            augment_dim=c.augment_dim,
            model_channels=c.model_channels,
            channel_mult=c.channel_mult,
            num_blocks=c.num_res_blocks,
            attn_resolutions=c.attention_resolutions,
            dropout=c.dropout,
            use_checkpoint=use_checkpoint,
        )
    shared: dict[str, Any] = {
        "image_size": c.image_size,
        "in_channels": c.in_channels,
        "model_channels": c.model_channels,
        "out_channels": c.out_channels,
        "num_res_blocks": c.num_res_blocks,
        "attention_resolutions": c.attention_rates,
        "dropout": c.dropout,
        "channel_mult": c.channel_mult,
        "use_checkpoint": use_checkpoint,
        "use_fp16": use_fp16,
        "num_heads": c.num_heads,
        "num_head_channels": c.num_head_channels,
        "use_scale_shift_norm": c.use_scale_shift_norm,
        "resblock_updown": c.resblock_updown,
        "use_new_attention_order": c.use_new_attention_order,
    }
    if c.family == "encoder":
        return EncoderUNetModel(**shared, pool=c.pool)
    if c.family == "super_res":
        return SuperResModel(**shared, num_classes=c.num_classes)
    return UNetModel(**shared, num_classes=c.num_classes)
