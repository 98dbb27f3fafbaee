"""Where a run computes."""

import pytest
import torch

from onchip.training.devices import choose_device, native_bfloat16


def test_a_device_is_chosen_or_refused_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cpu:x", "mps", "meta"):
        with pytest.raises(ValueError, match=f"device: .*{name}"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="that is here, and got 'cuda'"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "arm64", "bf16": True}, True),
        ({"architecture": "arm64"}, False),
    ],
)
def test_bfloat16_is_native_where_the_processor_has_it(
    capabilities: dict[str, object], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native_bfloat16(torch.device("cpu")) is native
