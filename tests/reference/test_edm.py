"""edm_block.py and edm.py against their formulas, in float64."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from resblock_bench.reference import EDMBlock, EDMUNet, TimestepBlock

E = 24


def edm_formula(oracle, w, x, emb, *, adaptive, how, heads, skip_scale, eps, drop=lambda h: h):
    def norm(name, h):
        groups = min(32, h.shape[1] // 4)
        return oracle.group_norm(h, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def conv(name, h):
        return oracle.conv(h, w[f"{name}.weight"], w[f"{name}.bias"])

    h = conv("conv0", oracle.resample(oracle.silu(norm("norm0", x)), how))
    e = (emb @ w["affine.weight"].T + w["affine.bias"])[:, :, None, None]  # no SiLU on emb
    C = h.shape[1]
    h = norm("norm1", h) * (1 + e[:, :C]) + e[:, C:] if adaptive else norm("norm1", h + e)
    h = conv("conv1", drop(oracle.silu(h)))
    x = oracle.resample(x, how)
    x = ((conv("skip", x) if "skip.weight" in w else x) + h) * skip_scale
    if heads:
        qkv = conv("qkv", norm("norm2", x)).flatten(2)
        a = oracle.multihead(qkv, heads, "heads, c, qkv").reshape(x.shape)
        x = (x + conv("proj", a)) * skip_scale
    return x


VARIANTS = {
    "adm": {"skip_scale": 1, "eps": 1e-5, "adaptive_scale": True, "resample_proj": False},
    "ddpmpp": {
        "skip_scale": math.sqrt(0.5),
        "eps": 1e-6,
        "adaptive_scale": False,
        "resample_proj": True,
    },
}


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(
    ("variant", "how", "c_in", "c_out", "heads"),
    [
        pytest.param(variant, how, c_in, c_out, heads, id=f"{variant}-{how}-{c_in}-{c_out}-{heads}")
        for variant, how, (c_in, c_out), heads in product(
            VARIANTS, (None, "up", "down"), ((16, 16), (64, 192)), (0, 2)
        )
    ],
)
def test_block_is_its_formula(oracle, randomise, variant, how, c_in, c_out, heads, use_checkpoint):
    """16, 64 and 192 channels are 4, 16 and 32 groups, of 4, 4 and 6 channels."""
    settings = VARIANTS[variant]
    block = EDMBlock(
        c_in,
        c_out,
        E,
        up=how == "up",
        down=how == "down",
        attention=heads > 0,
        num_heads=heads or None,
        use_checkpoint=use_checkpoint,
        **settings,
    ).double()
    randomise(block)
    assert block.resample == how
    w = dict(block.named_parameters())
    assert ("skip.weight" in w) == (c_in != c_out or (variant == "ddpmpp" and how is not None))
    x = 1e-2 * torch.randn(2, c_in, 4, 4, dtype=torch.float64)  # small, so that eps counts
    emb = torch.randn(2, E, dtype=torch.float64)
    x.requires_grad_()
    emb.requires_grad_()
    y = block(x, emb)
    expected = edm_formula(
        oracle,
        w,
        x,
        emb,
        adaptive=settings["adaptive_scale"],
        how=how,
        heads=heads,
        skip_scale=settings["skip_scale"],
        eps=settings["eps"],
    )
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    inputs = [x, emb, *w.values()]
    got = torch.autograd.grad(y, inputs, cotangent)
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs, cotangent))


def test_dropout_stands_before_the_last_convolution(oracle, randomise):
    block = EDMBlock(16, 16, E, dropout=0.4).double()
    randomise(block)
    x, emb = torch.randn(2, 16, 4, 4).double(), torch.randn(2, E).double()
    options = {"adaptive": True, "how": None, "heads": 0, "skip_scale": 1, "eps": 1e-5}
    w = dict(block.named_parameters())
    torch.manual_seed(3)
    y = block(x, emb)
    torch.manual_seed(3)
    drop = lambda h: F.dropout(h, 0.4)  # noqa: E731
    torch.testing.assert_close(y, edm_formula(oracle, w, x, emb, **options, drop=drop))
    torch.testing.assert_close(block.eval()(x, emb), edm_formula(oracle, w, x, emb, **options))


def test_heads_follow_from_the_channels_of_a_head():
    assert EDMBlock(192, 192, E, attention=True).num_heads == 3
    assert EDMBlock(192, 192, E).num_heads == 0
    assert isinstance(EDMBlock(16, 16, E), TimestepBlock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up": True, "down": True}, "up and down are both True"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"attention": True}, "16 channels cannot be split into num_heads=None.*_head=64"),
        ({"attention": True, "num_heads": 3}, "16 channels cannot be split into num_heads=3"),
    ],
    ids=["up-down", "dropout", "channels_per_head", "num_heads"],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EDMBlock(16, 16, E, **options)


def test_wrong_inputs_are_refused():
    block = EDMBlock(16, 16, E)
    with pytest.raises(ValueError, match=r"EDMBlock: x has shape \(1, 8, 4, 4\).*built for 16"):
        block(torch.zeros(1, 8, 4, 4), torch.zeros(1, E))
    with pytest.raises(ValueError, match=rf"emb has shape \(1, 5\), but must be \(N, {E}\)"):
        block(torch.zeros(1, 16, 4, 4), torch.zeros(1, 5))


def small(variant, **options):
    settings = {
        "img_resolution": 8,
        "in_channels": 3,
        "out_channels": 3,
        "variant": variant,
        "label_dim": 5,
        "augment_dim": 9,
        "model_channels": 64,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
        "dropout": 0.0,
    }
    return EDMUNet(**(settings | options))


def walk(oracle, variant, w, x, t, y, augment):
    """The two networks written out for two levels of one block each, attention at 4 pixels."""
    adm = variant == "adm"
    width = w["map_layer0.weight"].shape[1]

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    one_hot = torch.zeros(len(y), 5, dtype=x.dtype)
    one_hot[torch.arange(len(y)), y] = 1
    if adm:
        emb = oracle.sinusoids(t, width) + linear("map_augment", augment)
        emb = linear("map_layer1", oracle.silu(linear("map_layer0", emb)))
        emb = oracle.silu(emb + linear("map_label", one_hot))
    else:
        half = width // 2
        angle = torch.tensor(
            [[a * 10000 ** (-i / (half - 1)) for i in range(half)] for a in t.tolist()]
        ).double()
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        emb = emb + linear("map_label", one_hot * 5**0.5) + linear("map_augment", augment)
        emb = oracle.silu(linear("map_layer0", emb))
        emb = oracle.silu(linear("map_layer1", emb))

    eps = 1e-5 if adm else 1e-6

    def block(name, h, how=None, attends=False):
        v = oracle.within(w, f"{name}.")
        assert attends == ("qkv.weight" in v), name
        c = v["conv1.weight"].shape[0]
        return edm_formula(
            oracle,
            v,
            h,
            emb,
            adaptive=adm,
            how=how,
            heads=(c // 64 if adm else 1) if attends else 0,
            skip_scale=1 if adm else 0.5**0.5,
            eps=eps,
        )

    def conv(name, h):
        return oracle.conv(h, w[f"{name}.weight"], w[f"{name}.bias"])

    s0 = conv("enc.8x8_conv", x)
    s1 = block("enc.8x8_block0", s0)
    s2 = block("enc.4x4_down", s1, "down")
    s3 = block("enc.4x4_block0", s2, attends=True)
    h = block("dec.4x4_in0", s3, attends=True)
    h = block("dec.4x4_in1", h)
    h = block("dec.4x4_block0", torch.cat([h, s3], 1), attends=adm)
    h = block("dec.4x4_block1", torch.cat([h, s2], 1), attends=True)
    h = block("dec.8x8_up", h, "up")
    h = block("dec.8x8_block0", torch.cat([h, s1], 1))
    h = block("dec.8x8_block1", torch.cat([h, s0], 1))
    norm, last = ("out_norm", "out_conv") if adm else ("dec.8x8_aux_norm", "dec.8x8_aux_conv")
    h = oracle.group_norm(h, 16, w[f"{norm}.weight"], w[f"{norm}.bias"], eps)
    return conv(last, oracle.silu(h))


@pytest.mark.parametrize("labels", ["indices", "one-hot"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_is_what_its_state_dict_says(oracle, randomise, variant, labels):
    model = small(variant).double()
    randomise(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([0.7, -1.2]), torch.tensor([4, 0])
    augment = torch.randn(2, 9, dtype=torch.float64)
    expected = walk(oracle, variant, model.state_dict(), x, t, y, augment)
    given = y if labels == "indices" else torch.eye(5)[y]
    # The sinusoids are computed in float32.
    torch.testing.assert_close(model(x, t, given, augment), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_gradient_and_every_parameter_has_one(randomise, variant):
    results = []
    for use_checkpoint in (False, True):
        model = small(variant, use_checkpoint=use_checkpoint, dropout=0.2)
        randomise(model)
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
        model(x, torch.tensor([0.1, 2]), torch.tensor([0, 3]), torch.ones(2, 9)).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        assert grad is not None and grad.any(), name
    torch.testing.assert_close(results[1], results[0])


def test_initialisation_of_adm():
    """PyTorch's own but for zeros at the end of every branch, and labels of unit variance."""
    torch.manual_seed(0)
    model = small("adm", label_dim=1000)
    assert not model(torch.randn(1, 3, 8, 8), torch.zeros(1), torch.tensor([1])).any()
    block = model.dec["4x4_in0"]
    assert not block.conv1.weight.any()
    assert not block.proj.weight.any()
    assert not model.map_augment.weight.any()
    assert block.conv0.weight.any()
    assert abs(model.map_label.weight.std() - 1) < 0.01


def test_initialisation_of_ddpmpp():
    """Xavier-uniform with zero biases: the bound is gain · sqrt(6 / (fan_in + fan_out))."""
    torch.manual_seed(0)
    model = small("ddpmpp")
    block = model.dec["4x4_in0"]  # 128 channels
    largest = {
        "conv0": (block.conv0, math.sqrt(6 / (2 * 9 * 128))),
        "conv1": (block.conv1, 1e-5 * math.sqrt(6 / (2 * 9 * 128))),
        "qkv": (block.qkv, math.sqrt(0.2 * 6 / (4 * 128))),
        "proj": (block.proj, 1e-5 * math.sqrt(6 / (2 * 128))),
        "affine": (block.affine, math.sqrt(6 / (256 + 128))),
        "aux": (model.dec["8x8_aux_conv"], 1e-5 * math.sqrt(6 / (9 * 64 + 9 * 3))),
    }
    for name, (layer, bound) in largest.items():
        assert 0.99 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6), name
        assert not layer.bias.any(), name


def test_labels_are_given_if_and_only_if_the_model_has_them():
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="label_dim=5, so y must be given"):
        small("adm")(x, t)
    with pytest.raises(ValueError, match="label_dim=0, so y must be None"):
        small("adm", label_dim=0)(x, t, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"\(2,\) or \(2, 5\), got \(2, 4\)"):
        small("adm")(x, t, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="augment_dim is 0"):
        small("adm", augment_dim=0)(x, t, torch.tensor([1, 2]), torch.zeros(2, 9))


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="must be 'adm' or 'ddpmpp', got 'ncsnpp'"):
        small("ncsnpp")
