"""UnifiedReward 2.0: the score that a VLM writes (https://arxiv.org/abs/2503.05236, CodeGoat24/UnifiedReward-2.0-qwen-7b).

Qwen2.5-VL-7B is asked Flow-GRPO's question and answers in words, which end in "Final Score: x" with x from 1 to 5. The
reward is x / 5, and 0 for an answer without a score. 17 GB of memory.
"""

import functools
import re

import torch

from judges import device, in_batches, qwen_inputs

CHECKPOINT = "CodeGoat24/UnifiedReward-2.0-qwen-7b"
NEW_TOKENS = 512  # of an answer at most, as in the authors' script
QUESTION = (  # UnifiedReward's, as Flow-GRPO asks it (flow_grpo/rewards.py), word for word, in Qwen2.5-VL's chat format
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{image}<|vision_end|>"
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on two "
    "key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
    "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n2. Overall Image Quality: "
    "Examine the visual quality of this image, including clarity, detail preservation, color accuracy, and overall aesthetic "
    "appeal.\nBased on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\n"
    "Text Caption: [{prompt}]<|im_end|>\n<|im_start|>assistant\n"
)


@functools.cache
def load():
    """(model, tokenizer, image processor); OSError for a missing file, torch.OutOfMemoryError where it does not fit."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    processor = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    options = dict(dtype="auto", device_map=device(), use_safetensors=True)
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT, **options)
    except torch.OutOfMemoryError:
        raise torch.OutOfMemoryError("UnifiedReward needs 17 GB of free GPU memory") from None
    return model.eval(), tokenizer, processor


def final_score(answer):
    """The score that an answer ends in, from 1 to 5; 0 where there is none."""
    found = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", answer)
    return float(found[1]) if found else 0.0


@torch.no_grad()
def score(images, prompts):
    """UnifiedReward / 5 (B,) of images (B, 3, H, W) in [0, 1], in batches of 8, greedily."""
    model, tokenizer, processor = load()
    scores = []
    for batch in in_batches(images, prompts, 8):
        tokens, pixels = qwen_inputs(tokenizer, processor, QUESTION, *batch)
        in_image = (tokens.input_ids == model.config.image_token_id).int()  # without it an image has no rows and columns
        options = dict(mm_token_type_ids=in_image, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers = model.generate(**tokens, **pixels, **options)[:, tokens.input_ids.shape[1] :]
        scores += [final_score(answer) / 5 for answer in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    return torch.tensor(scores)
