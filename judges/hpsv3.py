"""HPSv3: how much people would prefer an image for its prompt (https://arxiv.org/abs/2508.03789, MizzenAI/HPSv3).

Qwen2-VL-7B is asked about image and prompt, and three linear layers read its hidden state at the token <|Reward|>. They
give the mean and the spread of a Gaussian; the mean is the score, about 10 for today's better models. 16 GB of memory.
"""

import functools
from pathlib import Path

import torch
from torch import nn

from judges import device, in_batches, qwen_inputs

CHECKPOINT = "MizzenAI/HPSv3"  # its HPSv3.safetensors
BASE = "Qwen/Qwen2-VL-7B-Instruct"  # the configuration and the tokenizer only
DTYPE = torch.bfloat16
PIXELS = 256 * 28 * 28  # of every image, resized: 256 tokens
# What HPSv3 was trained to be asked (hpsv3/dataset/data_collator_qwen.py), word for word, in Qwen2-VL's chat format:
QUESTION = Path(__file__).with_suffix(".txt").read_text("utf-8")


@functools.cache
def load():
    """(model, tokenizer, image processor); OSError for a missing file, torch.OutOfMemoryError where it does not fit."""
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="right")
    tokenizer.add_tokens("<|Reward|>", special_tokens=True)
    config = AutoConfig.from_pretrained(BASE)
    config.text_config.vocab_size = len(tokenizer)
    width = config.text_config.hidden_size
    prefixes = {"visual": "model.visual", "model": "model.language_model", "rm_head": "rm_head"}  # the file's: transformers'
    weights = {}
    for name, weight in load_file(hf_hub_download(CHECKPOINT, "HPSv3.safetensors")).items():
        prefix, _, rest = name.partition(".")
        if prefix != "lm_head":
            weights[f"{prefixes[prefix]}.{rest}"] = weight
    try:
        with torch.device(device()):
            head = [nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
            backbone = AutoModel.from_config(config, dtype=DTYPE).to(DTYPE)  # .to: the authors' rotary frequencies are rounded too
            model = nn.ModuleDict({"model": backbone, "rm_head": nn.Sequential(*head)})
    except torch.OutOfMemoryError:
        raise torch.OutOfMemoryError("HPSv3 needs 16 GB of free GPU memory") from None
    model.load_state_dict(weights)
    return model.eval(), tokenizer, Qwen2VLImageProcessorPil(min_pixels=PIXELS, max_pixels=PIXELS)


@torch.no_grad()
def score(images, prompts):
    """HPSv3's mean (B,) of images (B, 3, H, W) in [0, 1], in batches of 4."""
    model, tokenizer, processor = load()
    parts = []
    for batch in in_batches(images, prompts, 4):
        tokens, pixels = qwen_inputs(tokenizer, processor, QUESTION, *batch)
        # The authors trained with 0, 1, 2... on all three axes, not with Qwen2-VL's rows and columns.
        positions = torch.arange(tokens.input_ids.shape[1], device=device()).expand(3, len(tokens.input_ids), -1)
        hidden = model["model"](**tokens, **pixels, position_ids=positions, use_cache=False).last_hidden_state
        rewarded = tokens.input_ids == tokenizer.convert_tokens_to_ids("<|Reward|>")
        parts.append(model["rm_head"](hidden[rewarded].float())[:, 0].cpu())
    return torch.cat(parts)
