"""ImageReward: how well people would like an image for its prompt (https://arxiv.org/abs/2304.05977, zai-org/ImageReward).

BLIP's image encoder, its text encoder that attends to the image's patches, and five linear layers on the [CLS] token.
The score has mean 0 and standard deviation 1 over the authors' data; most images lie between -2 and 2. About 2 GB.
"""

import functools

import torch
from torch import nn

from judges import device, in_batches

CHECKPOINT = "zai-org/ImageReward"  # its ImageReward.pt
TOKENIZER = "google-bert/bert-base-uncased"
VISION = dict(  # ViT-L/16
    image_size=224, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, layer_norm_eps=1e-6
)  # fmt: skip
TEXT = dict(encoder_hidden_size=1024, num_attention_heads=12)  # else BlipTextConfig's defaults, BERT base
LENGTH = 35  # tokens of a prompt, padded or cut
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, from the authors' ImageReward.py
RENAMES = {  # name in ImageReward.pt -> in transformers, in this order
    "blip.visual_encoder.": "vision.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "vision.blocks.": "vision.encoder.layers.",
    "vision.norm.": "vision.post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


@functools.cache
def load():
    """(model, tokenizer, image processor); OSError where a file is neither on disk nor to be had."""
    from huggingface_hub import hf_hub_download
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPImageProcessorPil

    weights = {}
    for name, weight in torch.load(hf_hub_download(CHECKPOINT, "ImageReward.pt"), map_location="cpu", weights_only=True).items():
        if not name.startswith(UNUSED):
            weights[functools.reduce(lambda name, rename: name.replace(*rename), RENAMES.items(), name)] = weight
    text = BlipTextConfig(**TEXT)
    widths = [text.hidden_size, 1024, 128, 64, 16, 1]
    linears = [nn.Linear(*pair) for pair in zip(widths, widths[1:])]  # nothing in between but dropout, idle in evaluation
    dropped = [module for linear in linears[:3] for module in (linear, nn.Dropout())]
    model = nn.ModuleDict(
        {
            "vision": BlipVisionModel(BlipVisionConfig(**VISION)),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "head": nn.Sequential(*dropped, *linears[3:]),
        }
    )
    model.load_state_dict(weights)
    return model.eval().to(device()), BertTokenizer.from_pretrained(TOKENIZER), CLIPImageProcessorPil()


@torch.no_grad()
def score(images, prompts):
    """ImageReward (B,) of images (B, 3, H, W) in [0, 1], in batches of 16."""
    model, tokenizer, processor = load()
    parts = []
    options = dict(padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    for pictures, texts in in_batches(images, prompts, 16):
        pixels = processor(images=pictures, return_tensors="pt").to(device())
        tokens = tokenizer(texts, **options).to(device())
        patches = model["vision"](**pixels).last_hidden_state
        words = model["text"](tokens.input_ids, tokens.attention_mask, encoder_hidden_states=patches).last_hidden_state
        parts.append(model["head"](words[:, 0]).squeeze(1).cpu())
    return (torch.cat(parts) - MEAN) / STD
