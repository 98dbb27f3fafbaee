"""Scales and rounding, against e4m3's definition."""

import math

import pytest
import torch

from onchip.ops.attention_fp8.quantize import BLOCK, E4M3, blocks, quantize

from .oracle import NUMBERS, e4m3


def rounded(x, cu_seqlens=None, block_scales=True):
    return quantize(x, blocks(x, cu_seqlens, block_scales))


def ones_above(x):
    """(1, rows, 1, dim): `x` with a 448 in front of each row, so that every scale is 1."""
    return torch.nn.functional.pad(x, (1, 0), value=448.0)[None, :, None]


def test_rounds_to_nearest_with_ties_to_even():
    middles = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    near = [middles.float(), *(middles.float().nextafter(torch.tensor(end)) for end in (0.0, math.inf))]
    x = torch.cat([NUMBERS.float(), *near, torch.rand(10_000) * 448, torch.exp2(torch.rand(10_000) * 24 - 15)])
    x = torch.stack([x, -x], 1)
    values, scales = rounded(ones_above(x.clamp(-448, 448)))
    assert (scales == 1).all()
    assert torch.equal(values[0, :, 0, 1:].double(), e4m3(x))


def test_the_definition_is_the_format():
    codes = torch.arange(127, dtype=torch.uint8)
    assert torch.equal(codes.view(E4M3).double(), NUMBERS)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("shape", [(2, 300, 3, 5), (1, 1, 1, 1), (2, 128, 2, 4), (0, 5, 2, 4), (2, 0, 2, 4)])
def test_scale_takes_the_largest_of_a_block_to_448(shape, factor):
    x = torch.randn(shape) * factor
    values, scales = rounded(x)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (E4M3, x.shape, torch.float32, x.shape[:-1])
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in shape[:3])).tolist():
        start = t // BLOCK * BLOCK
        scale = x[b, start : start + BLOCK, h].abs().max() / 448
        assert scales[b, t, h] == scale
    assert torch.equal(values.double(), e4m3(x / scales[..., None]))
    for b in range(shape[0]):
        for start in range(0, shape[1], BLOCK):
            assert (values[b, start : start + BLOCK].double().abs().amax((0, 2)) == 448).all()


def test_one_scale_for_a_head_of_a_sequence():
    x = torch.randn(2, 300, 3, 5)
    values, scales = rounded(x, block_scales=False)
    assert torch.equal(scales, (x.abs().amax((1, 3), keepdim=True) / 448)[..., 0].expand(scales.shape))
    assert torch.equal(values.double(), e4m3(x / scales[..., None]))


@pytest.mark.parametrize("block_scales", [True, False])
def test_packed_blocks_start_with_their_sequences(block_scales):
    lengths = [5, 0, 128, 300, 1, 0, 129, 127, 0]
    x = torch.randn(sum(lengths), 3, 4)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    values, scales = rounded(x, cu, block_scales)
    for part, part_values, part_scales in zip(
        x.split(lengths), values.double().split(lengths), scales.split(lengths), strict=True
    ):
        alone = rounded(part[None], None, block_scales)
        assert torch.equal(part_values, alone.values[0].double())
        assert torch.equal(part_scales, alone.scales[0])


def test_zeros_stay_zeros():
    values, scales = rounded(torch.zeros(1, 200, 2, 8))
    assert (values.float() == 0).all() and scales.isfinite().all() and (scales > 0).all()


def test_the_smallest_numbers_are_not_divided_by_zero():
    values, scales = rounded(torch.full((1, 4, 1, 8), 1e-44))
    assert (values.float() == 0).all() and (scales > 0).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_does_not_look_finite(bad):
    x = torch.randn(1, 300, 2, 8)
    x[0, 130, 1, 3] = bad
    values, scales = rounded(x)
    back = values.float() * scales[..., None]
    assert back[0, 128:256, 1].isnan().all()
    assert back[0, :, 0].isfinite().all() and back[0, :128, 1].isfinite().all() and back[0, 256:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_as_its_float32(dtype):
    x = torch.randn(1, 200, 2, 8).to(dtype)
    for got, want in zip(rounded(x), rounded(x.float()), strict=True):
        assert torch.equal(got.float(), want.float())
