import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from onchip.nn.rotary import RotaryScaling, RotaryTable, rotate


def test_against_the_formula():
    x = torch.randn(2, 7, 3, 6, dtype=torch.float64)
    y = rotate(x, RotaryTable(6, base=100.0)(7, like=x))
    for t in range(7):
        for i in range(3):
            angle = t * 100.0 ** (-2 * i / 6)
            turn = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=x.dtype
            )
            expected = torch.einsum("ij,bhj->bhi", turn, x[:, t, :, 2 * i : 2 * i + 2])
            torch.testing.assert_close(y[:, t, :, 2 * i : 2 * i + 2], expected)


def test_the_table_is_exact_at_far_positions():
    table = RotaryTable(4)(1_000_000, like=torch.randn(1))
    assert table.dtype == torch.float32
    assert abs(table[-1, 0, 0].item() - math.cos(999_999)) < 1e-7


def test_the_table_is_kept_and_grown():
    rotary = RotaryTable(4)
    first = rotary(100, like=torch.randn(1))
    assert rotary(90, like=torch.randn(1)).data_ptr() == first.data_ptr()
    torch.testing.assert_close(rotary(1000, like=torch.randn(1))[:100], first, rtol=0, atol=0)
    assert rotary(10, like=torch.randn(1).double()).dtype == torch.float64


def test_compiled_arithmetic_is_the_same():
    x, table = torch.randn(1, 5, 2, 8), RotaryTable(8)(5, like=torch.randn(1))
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table))


def test_a_stand_in_for_a_tensor_is_not_kept():
    table = RotaryTable(8)
    with FakeTensorMode() as mode:
        assert table(5, like=mode.from_tensor(torch.randn(1))).shape == (5, 4, 2)
    assert type(table(5, like=torch.randn(1))) is torch.Tensor


def test_scaling_slows_long_waves_alone():
    scaling = RotaryScaling.of({"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 64})
    turns_in_64_tokens = torch.tensor([8.0, 4.0, 2.5, 1.0, 0.1], dtype=torch.float64)
    frequencies = turns_in_64_tokens * 2 * torch.pi / 64
    expected = torch.tensor([1.0, 1.0, 0.5 + 0.5 / 4, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(scaling(frequencies) / frequencies, expected)


@pytest.mark.parametrize(
    "values",
    [
        {"factor": 8.0},
        {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_length": 64},
        {"factor": 0.5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 64},
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(values):
    with pytest.raises(ValueError, match="rope_scaling must have"):
        RotaryScaling.of(values)
