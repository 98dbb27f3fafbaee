"""The one library in which PyTorch's dispatcher finds onchip's ops, as `torch.ops.onchip`."""

import torch

library = torch.library.Library("onchip", "DEF")  # type: ignore[no-untyped-call]
