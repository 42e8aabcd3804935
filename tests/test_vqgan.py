"""The VQGAN against transformers' encoder and a decoder written out here. It needs no published weights."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from lumina_rt.checkpoint import CheckpointError
from lumina_rt.vqgan import CONFIG, VQGAN, WEIGHTS, VQGANConfig, to_uint8

# Every shape differs from its neighbours', and both halves have a nin_shortcut; transformers fixes 32 groups.
SMALL = VQGANConfig(embed_dim=12, n_embed=50, z_channels=8, ch=32, ch_mult=(1, 2, 2), num_res_blocks=2)
TINY = VQGANConfig(embed_dim=6, n_embed=20, z_channels=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4)


def random_vqgan(config, seed=0):
    """Weights under which every part matters: nothing is at its neutral initial value."""
    torch.manual_seed(seed)
    model = VQGAN(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_pixels(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def small():
    return random_vqgan(SMALL)


@pytest.fixture(scope="module")
def tiny():
    return random_vqgan(TINY)


@pytest.fixture
def saved(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "vqgan")
    return tmp_path / "vqgan"


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def problems_of(path):
    with pytest.raises(CheckpointError) as error:
        VQGAN.from_pretrained(path)
    return error.value.problems


def test_full_size_has_the_names_and_counts_of_the_checkpoint():
    with torch.device("meta"):
        tensors = VQGAN(VQGANConfig()).state_dict()
    counts = {}
    for name, tensor in tensors.items():
        counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + tensor.numel()
    assert len(tensors) == 293
    assert sum(counts.values()) == 68_718_467
    assert counts == {
        "encoder": 27_194_880,
        "decoder": 39_294_851,
        "quantize": 2_097_152,
        "quant_conv": 65_792,
        "post_quant_conv": 65_792,
    }
    assert VQGANConfig().factor == 16

    block = [f"{part}{i}" for part in ("norm", "conv") for i in (1, 2)]
    mid = [f"mid.block_{i}.{part}" for i in (1, 2) for part in block]
    mid += [f"mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
    ends = ["conv_in", "norm_out", "conv_out", *mid]
    parts = [f"encoder.{name}" for name in ends] + [f"decoder.{name}" for name in ends]
    parts += [f"encoder.down.{level}.block.{i}.{part}" for level in range(5) for i in range(2) for part in block]
    parts += [f"encoder.down.{level}.downsample.conv" for level in range(4)]
    parts += [f"decoder.up.{level}.block.{i}.{part}" for level in range(5) for i in range(3) for part in block]
    parts += [f"decoder.up.{level}.upsample.conv" for level in range(1, 5)]
    parts += ["quant_conv", "post_quant_conv"]
    shortcuts = {
        "encoder.down.2.block.0": [256, 128, 1, 1],
        "encoder.down.4.block.0": [512, 256, 1, 1],
        "decoder.up.3.block.0": [256, 512, 1, 1],
        "decoder.up.1.block.0": [128, 256, 1, 1],
    }
    parts += [f"{name}.nin_shortcut" for name in shortcuts]
    names = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert tensors.keys() == names | {"quantize.embedding.weight"}

    shapes = {
        "quantize.embedding.weight": [8192, 256],
        "quant_conv.weight": [256, 256, 1, 1],
        "post_quant_conv.weight": [256, 256, 1, 1],
        "decoder.conv_in.weight": [512, 256, 3, 3],
        "decoder.conv_out.weight": [3, 128, 3, 3],
        **{f"{name}.nin_shortcut.weight": shape for name, shape in shortcuts.items()},
    }
    assert {name: list(tensors[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 40), (36, 12)])
def test_encoder_and_quantizer_equal_transformers(small, height, width):
    c = SMALL
    other = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=c.embed_dim,
            num_embeddings=c.n_embed,
            latent_channels=c.z_channels,
            base_channels=c.ch,
            channel_multiplier=list(c.ch_mult),
            num_res_blocks=c.num_res_blocks,
        )
    ).eval()
    ours = {name: tensor for name, tensor in small.state_dict().items() if "decoder." not in name}
    other.load_state_dict(ours)
    pixels = random_pixels(2, 3, height, width)
    with torch.no_grad():
        expected = other.quant_conv(other.encoder(pixels))
        codes = other.encode(pixels).image_tokens.view(2, height // 4, width // 4)
        latents = small.encode_latents(pixels)
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(codes.unique()) > 3
    assert torch.equal(small.encode(pixels), codes)
    assert small.encode(pixels).dtype == torch.int64


def decode_by_hand(tensors, c, codes):
    """The decoder of the specification, in float64, from nothing but named tensors."""
    p = {name: tensor.double() for name, tensor in tensors.items()}

    def conv(name, x):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        groups = x.reshape(len(x), c.norm_groups, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
        x = ((groups - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
        return x * p[f"{name}.weight"].view(-1, 1, 1) + p[f"{name}.bias"].view(-1, 1, 1)

    def swish(x):
        return x * torch.sigmoid(x)

    def block(name, x):
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in p else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=2)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    x = p["quantize.embedding.weight"][codes].movedim(3, 1)
    x = conv("decoder.conv_in", conv("post_quant_conv", x))
    x = block("decoder.mid.block_1", x)
    x = attention("decoder.mid.attn_1", x)
    x = block("decoder.mid.block_2", x)
    for level in reversed(range(len(c.ch_mult))):
        for i in range(c.num_res_blocks + 1):
            x = block(f"decoder.up.{level}.block.{i}", x)
        if level > 0:
            x = conv(f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("decoder.conv_out", swish(norm("decoder.norm_out", x)))


@pytest.mark.parametrize(("h", "w"), [(4, 4), (1, 3), (2, 7)])
def test_decoder_equals_the_specification_written_out(small, h, w):
    codes = torch.randint(SMALL.n_embed, (2, h, w), generator=torch.Generator().manual_seed(2))
    expected = decode_by_hand(small.state_dict(), SMALL, codes)
    pixels = small.decode(codes)
    assert pixels.shape == (2, 3, 4 * h, 4 * w)
    assert pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_activations_far_from_zero_keep_their_precision():
    model = random_vqgan(SMALL)
    with torch.no_grad():
        model.encoder.conv_in.bias += 50
        pixels = random_pixels(1, 3, 32, 32)
        latents = model.encode_latents(pixels)
        expected = model.double().encode_latents(pixels)
    assert (latents - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_one_latent_is_an_image_too(tiny):
    pixels = tiny.decode(torch.tensor([[[3]]]))
    assert pixels.shape == (1, 3, 2, 2)
    assert tiny.encode(pixels).shape == (1, 1, 1)


def test_a_batch_equals_its_images_one_by_one(tiny):
    pixels = random_pixels(3, 3, 6, 10)
    codes = tiny.encode(pixels)
    assert torch.equal(codes, torch.cat([tiny.encode(image) for image in pixels.split(1)]))
    alone = torch.cat([tiny.decode(image) for image in codes.split(1)])
    torch.testing.assert_close(tiny.decode(codes), alone, rtol=1e-5, atol=1e-6)


def test_codes_are_the_nearest_rows_however_many_latents(tiny):
    z = torch.randn(2, TINY.embed_dim, 50, 30, generator=torch.Generator().manual_seed(3))  # several chunks
    codebook = tiny.quantize.embedding.weight.double()
    distances = (z.double()[:, None] - codebook[None, :, :, None, None]).square().sum(2)
    codes = tiny.quantize(z)
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert codes.shape == (2, 50, 30)
    assert (chosen - distances.amin(1)).max() < 1e-5


def test_a_code_survives_the_codebook_and_ties_go_to_the_lowest(tiny):
    model = random_vqgan(replace(TINY, n_embed=64))
    codes = torch.arange(64).view(1, 4, 16)
    assert torch.equal(model.quantize(model.quantize.lookup(codes)), codes)
    with torch.no_grad():
        model.quantize.embedding.weight[32:] = model.quantize.embedding.weight[:32]
    assert torch.equal(model.quantize(model.quantize.lookup(codes)), codes % 32)


def test_to_uint8_truncates_and_cuts_off():
    # Both ends, beyond them, 0 (127.5), between, and just under and over whole steps of 1/255.
    values = [-1.0, 1.0, -1.5, 7.0, 0.0, 0.5, -0.5, 0.9999, 2 * 200.9 / 255 - 1, 2 * 200.1 / 255 - 1]
    expected = [0, 255, 0, 255, 127, 191, 63, 254, 200, 200]
    pixels = torch.tensor(values).view(1, 1, 2, 5).repeat(1, 3, 1, 1)
    pixels[:, 1] = 1
    image = to_uint8(pixels)
    assert image.dtype == torch.uint8
    assert image.shape == (1, 2, 5, 3)
    assert image[0, :, :, 0].flatten().tolist() == expected
    assert image[0, :, :, 1].flatten().tolist() == [255] * 10


def test_gradients_reach_every_parameter(tiny):
    model = random_vqgan(TINY)
    pixels = random_pixels(1, 3, 6, 8)
    z = model.encode_latents(pixels)
    quantised = model.quantize.lookup(model.quantize(z))
    straight_through = z + (quantised - z).detach()
    loss = model.decode_latents(straight_through).square().mean() + (quantised - z).square().mean()
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # A key bias adds the same to every score of a row, so softmax takes it out again: only that one may be 0.
    idle += [name for name, p in model.named_parameters() if not p.grad.any() and not name.endswith("k.bias")]
    assert idle == []
    assert not model.encode(pixels).requires_grad
    assert not model.decode(model.encode(pixels)).requires_grad


def test_saved_and_loaded_is_bit_equal(tiny, saved):
    codes = tiny.encode(random_pixels(1, 3, 8, 8))
    for path in (saved, str(saved), saved / WEIGHTS):
        loaded = VQGAN.from_pretrained(path)
        assert loaded.config == TINY
        assert loaded.state_dict().keys() == tiny.state_dict().keys()
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in tiny.state_dict().items())
        assert torch.equal(loaded.decode(codes), tiny.decode(codes))
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert json.loads((saved / CONFIG).read_text())["ch_mult"] == [1, 2]


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    VQGAN.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_loads_and_still_gives_float32_pixels(tiny, saved):
    loaded = VQGAN.from_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    pixels = loaded.decode(loaded.encode(random_pixels(1, 3, 8, 8)))
    assert pixels.dtype == torch.float32


def test_a_decoder_in_bfloat16_draws_the_same_picture_and_codes_stay_exact(tiny, saved):
    pixels, codes = random_pixels(2, 3, 8, 12), torch.randint(20, (2, 4, 6), generator=torch.Generator().manual_seed(2))
    fast = VQGAN.from_pretrained(saved).decode_in(torch.bfloat16)
    assert torch.equal(fast.encode_latents(pixels), tiny.encode_latents(pixels))
    exact, drawn = tiny.decode(codes), fast.decode(codes)
    assert drawn.dtype == torch.float32
    error = (drawn - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.02  # some roundings of 2^-9 each


def test_a_failed_save_leaves_what_was_there(tiny, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lumina_rt.vqgan.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        random_vqgan(TINY, seed=9).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_all_wrong_names_are_in_one_report(saved):
    def change(tensors):
        del tensors["encoder.conv_in.bias"], tensors["decoder.up.1.upsample.conv.weight"]
        tensors["decoder.up.0.upsample.conv.weight"] = torch.zeros(1)
        tensors["quant_conv.weight"] = torch.zeros(4, 6, 1, 1)
        tensors["quant_conv.bias"] = torch.zeros(6, dtype=torch.int32)

    change_tensors(saved, change)
    assert problems_of(saved) == [
        "misshaped: quant_conv.bias is torch.int32 [6]; expected floats [6]",
        "misshaped: quant_conv.weight is torch.float32 [4, 6, 1, 1]; expected floats [6, 4, 1, 1]",
        "missing: decoder.up.1.upsample.conv.weight",
        "missing: encoder.conv_in.bias",
        "unexpected: decoder.up.0.upsample.conv.weight",
    ]


def test_a_long_report_is_cut(saved):
    change_tensors(saved, dict.clear)
    with pytest.raises(CheckpointError) as error:
        VQGAN.from_pretrained(saved)
    lines = str(error.value).splitlines()
    assert str(saved) in lines[0]
    assert len(lines) == 22
    assert lines[-1].strip() == f"... and {len(error.value.problems) - 20} more"


def test_missing_files_are_reported_together(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, name in (("empty", WEIGHTS), (f"empty/{WEIGHTS}", WEIGHTS), ("absent", "absent")):
        problems = problems_of(tmp_path / path)
        assert [problem.split(":")[0] for problem in problems] == [CONFIG, name]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:keep])
    (problem,) = problems_of(saved)
    assert problem.startswith(f"{WEIGHTS}: ")


def test_a_corrupt_file_is_refused(saved):
    (saved / WEIGHTS).write_bytes(b"\xff" * 1000)
    (saved / CONFIG).write_bytes(b"{")
    problems = problems_of(saved)
    assert [problem.split(":")[0] for problem in problems] == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"double_z": True}, "double_z is True"),
        ({"attn_resolutions": [16]}, "attn_resolutions is [16]"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"tanh_out": True}, "tanh_out"),
        ({"ch": 0}, "ch is 0"),
        ({"ch": 9}, "ch is 9"),
        ({"n_embed": "many"}, "n_embed is 'many'"),
        ({"num_res_blocks": True}, "num_res_blocks is True"),
        ({"ch_mult": []}, "ch_mult is []"),
        ({"ch_mult": [1, -2]}, "ch_mult is (1, -2)"),
        ({"ch_mult": 4}, "ch_mult is 4"),
        ({"ch_mult": [1] * 17}, "ch_mult is [1, 1, 1"),
        ({"ch_mult": [1, 65]}, "ch_mult is (1, 65)"),
        ({"num_res_blocks": 65}, "num_res_blocks is 65"),
        ({"n_embed": 2**20 + 1}, "n_embed is 1048577"),
        ({"ch": 10**30}, "ch is 1000000"),
        ({"dropout": "x" * 10**6}, "dropout is 'xxx"),
        ({"a\nb": 1}, r"a\nb"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(saved, change, named):
    (saved / CONFIG).write_text(json.dumps({**TINY.to_dict(), **change}))
    with pytest.raises(ValueError, match=r"expected|supported") as error:
        VQGANConfig.load(saved / CONFIG)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
    (problem,) = problems_of(saved)
    assert named in problem


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, '"ch"', "\xff"])
def test_a_config_that_is_no_object_is_refused(saved, text):
    (saved / CONFIG).write_bytes(text.encode("latin-1"))
    (problem,) = problems_of(saved)
    assert problem.startswith(f"{CONFIG}: ")


def test_the_largest_sizes_still_build_on_meta():
    extremes = {"embed_dim": 2**20, "n_embed": 2**20, "z_channels": 2**20, "ch": 2**20}
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(**extremes, in_channels=2**20, out_ch=2**20, ch_mult=(64,)))
    assert model.decoder.conv_in.weight.shape == (2**26, 2**20, 3, 3)


def test_the_originals_neutral_keys_are_accepted():
    neutral = {"double_z": False, "attn_resolutions": [], "dropout": 0.0, "resolution": 512}
    assert VQGANConfig.from_dict({**TINY.to_dict(), **neutral}) == TINY
    assert VQGANConfig.from_dict({}) == VQGANConfig()


@pytest.mark.parametrize(
    ("pixels", "named"),
    [
        (torch.zeros(1, 3, 7, 8), "8 x 7"),
        (torch.zeros(1, 3, 8, 9), "9 x 8"),
        (torch.zeros(1, 4, 8, 8), "[1, 4, 8, 8]"),
        (torch.zeros(3, 8, 8), "[3, 8, 8]"),
        (torch.zeros(1, 3, 0, 8), "[1, 3, 0, 8]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_bad_pixels_are_refused_with_their_value(tiny, pixels, named):
    with pytest.raises(ValueError, match="expected") as error:
        tiny.encode(pixels)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        (torch.full((1, 2, 2), 20), "code 20;"),
        (torch.tensor([[[3, -1]]]), "code -1;"),
        (torch.zeros(1, 2, 2), "torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "torch.bool"),
        (torch.zeros(2, 2, dtype=torch.int64), "[2, 2]"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), "[1, 0, 2]"),
    ],
)
def test_bad_codes_are_refused_with_their_value(tiny, codes, named):
    with pytest.raises(ValueError, match="expected") as error:
        tiny.decode(codes)
    assert named in str(error.value)


def test_any_integer_dtype_of_codes_will_do(tiny):
    codes = torch.tensor([[[0, 19], [7, 1]]])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(tiny.decode(codes.to(dtype)), tiny.decode(codes))


def test_the_encoder_rounds_nothing_to_tf32_and_leaves_the_setting_as_it_was():
    vqgan, seen = VQGAN(TINY), []
    vqgan.encoder.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    vqgan.encode(torch.zeros(1, 3, 64, 64))
    assert before
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
