"""Similarity of image and prompt: CLIP (https://arxiv.org/abs/2103.00020) and PickScore (https://arxiv.org/abs/2305.01569)."""

import functools

import torch

from judges import device, to_uint8

CHECKPOINTS = {  # the model and its processor
    "clip": ("openai/clip-vit-large-patch14",) * 2,
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}


@functools.cache
def load(name):
    """(model, processor) of a name in CHECKPOINTS; OSError if they are neither on disk nor to be had."""
    from transformers import AutoProcessor, CLIPModel

    checkpoint, processor = CHECKPOINTS[name]
    processor = AutoProcessor.from_pretrained(processor)
    return CLIPModel.from_pretrained(checkpoint, use_safetensors=True).eval().to(device()), processor


@torch.no_grad()
def embed(model, processor, images, texts):
    """Unit-length embeddings (B, D) of uint8 images and (N, D) of texts, in batches of 32 images."""
    parts = []
    for start in range(0, len(images), 32):
        inputs = processor(text=texts, images=list(images[start : start + 32]), return_tensors="pt", padding=True, truncation=True)
        outputs = model(**inputs.to(model.device))
        parts.append(outputs.image_embeds.float().cpu())
    return torch.cat(parts), outputs.text_embeds.float().cpu()


def similarity(name, images, prompts):
    """Cosine (B,) between each image and its prompt."""
    unique = list(dict.fromkeys(prompts))
    image_embeds, text_embeds = embed(*load(name), to_uint8(images), unique)
    return (image_embeds * text_embeds[[unique.index(p) for p in prompts]]).sum(1)


def score(images, prompts):
    """CLIP's cosine similarity (B,) of image and prompt."""
    return similarity("clip", images, prompts)


def pickscore(images, prompts):
    """PickScore (B,) over 26, about 1 at its upper end as Flow-GRPO scales it."""
    return load("pickscore")[0].logit_scale.exp().item() * similarity("pickscore", images, prompts) / 26


def distances(images, prompts):
    """{prompt: mean of 1 - cosine over the pairs of its images' embeddings}, of images (B, 3, H, W), two or more per prompt."""
    embeds, _ = embed(*load("clip"), to_uint8(images), list(prompts[:1]))
    own = {prompt: embeds[[p == prompt for p in prompts]].double() for prompt in dict.fromkeys(prompts)}
    return {prompt: float(torch.pdist(rows).square().mean() / 2) for prompt, rows in own.items()}  # |a - b|² = 2 - 2 cos
