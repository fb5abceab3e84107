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


def in_batches(images, prompts, size):
    """(list of uint8 images (H, W, 3), list of prompts), `size` at a time."""
    for start in range(0, len(prompts), size):
        yield list(to_uint8(images[start : start + size])), prompts[start : start + size]


def qwen_inputs(tokenizer, processor, question, images, prompts):
    """Tokens and pixels of a Qwen VL model that is asked a question with places for {image} and {prompt}."""
    pixels = processor(images=images, return_tensors="pt").to(device())
    image = "<|image_pad|>" * (int(pixels["image_grid_thw"][0].prod()) // processor.merge_size**2)
    texts = [question.format(image=image, prompt=prompt) for prompt in prompts]
    return tokenizer(texts, padding=True, return_tensors="pt").to(device()), pixels
