"""Weights in int8 and int4: what rounding costs, and that both layouts are what they say."""

import pytest
import torch
from lumina_rt.kernels import reference
from lumina_rt.kernels.quantization import GROUP, QuantizedWeight, dequantize, quantize


def weights(outputs=40, inputs=256, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.007), (4, 0.11)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_costs_what_the_bits_allow(bits, limit, scale):
    weight = scale * weights()
    error = dequantize(quantize(weight, bits)) - weight
    assert error.norm() / weight.norm() < limit
    steps = 254 if bits == 8 else 16  # over the range of a group, whose scale is rounded to 8 bits
    groups, largest = error.abs().unflatten(1, (-1, GROUP)), weight.abs().unflatten(1, (-1, GROUP)).amax(-1, True)
    assert (groups <= largest * (1.02 / steps if bits == 8 else 0.26)).all()


def test_clipping_makes_int4_better_than_the_whole_range_does(monkeypatch):
    weight = weights()
    best = (dequantize(quantize(weight, 4)) - weight).norm()
    monkeypatch.setattr("lumina_rt.kernels.quantization.INT4_SHRINKS", (1.0,))
    assert best < 0.99 * (dequantize(quantize(weight, 4)) - weight).norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_steps_come_back_as_they_were(bits):
    lowest, highest = (-127, 127) if bits == 8 else (-8, 7)
    values = torch.randint(lowest, highest + 1, (6, 2, GROUP), generator=torch.Generator().manual_seed(1))
    values[..., 5] = lowest  # so that the largest weight is on a step
    weight = (values * torch.tensor([0.5, 4.0])[:, None]).flatten(1)
    assert torch.equal(dequantize(quantize(weight, bits)), weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_of_zeros_stays_zero(bits):
    weight = weights()
    weight[3, :GROUP] = 0
    found = dequantize(quantize(weight, bits))
    assert (found[3, :GROUP] == 0).all()
    assert found.isfinite().all()


def test_of_eight_int4_byte_j_holds_input_j_and_input_j_plus_4():
    weight = torch.arange(-8.0, 8).repeat(4)[None]  # 64 inputs, all steps of 1
    found = quantize(weight, 4)
    assert found.values[0, :8].tolist() == [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB]
    assert found.scales.tolist() == [[1.0]]
    assert found.bits == 4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_multiplies_by_the_dequantized_weights(bits, dtype):
    weight = quantize(weights(), bits)
    x = torch.randn(3, 256, dtype=dtype)
    exact = x.double() @ dequantize(weight).double().T
    found = reference.linear(x, reference.pack(weight))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 * float(exact.norm()))
    assert isinstance(reference.pack(weight), QuantizedWeight)


def test_what_cannot_be_cut_into_groups_is_refused():
    with pytest.raises(ValueError, match="96 inputs; quantizing expects a multiple of 64"):
        quantize(weights(4, 96), 4)
