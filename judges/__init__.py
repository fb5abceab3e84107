"""Rewards that are networks, a file each: `load()` fetches what it needs, `score(images, prompts)` gives (B,) floats.

Images are (B, 3, H, W) float tensors in [0, 1] on the CPU. Networks are loaded once, onto the GPU if there is one.
"""

import torch


def device():
    """Where a judge's network goes."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def to_uint8(images):
    """(B, H, W, 3) uint8 array of images (B, 3, H, W) in [0, 1]."""
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
