"""What bfloat16 costs on a device."""

from __future__ import annotations


def has_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16 itself. Others emulate it, some ten times slower than float32."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
