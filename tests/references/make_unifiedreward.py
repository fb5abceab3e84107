"""Writes unifiedreward.json: scores by UnifiedReward's inference code for Qwen2.5-VL, tiny and with weights from a seed.

    python3.11 -m venv venv && . venv/bin/activate
    pip install torch==2.4.1 torchvision==0.19.1 transformers==4.51.3 qwen-vl-utils==0.0.8
    python tests/references/make_unifiedreward.py

There is no package of UnifiedReward. These are the calls of its script for a Qwen model, one image at a time
(inference_qwen/image_generation/qwen_point_score_image_generation.py), with Flow-GRPO's question, scale and rule for the answer.
A tiny random model says nothing sensible, so its vocabulary has scores as whole tokens and its last layer no other rows.
"""

import json
import re
import tempfile
from pathlib import Path

import common
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SEED, GAIN = 0, 1.5  # with so large weights images and prompts get different answers
NEW_TOKENS = 4
PROMPTS = ["a red circle", "The sign says: two cats! " * 5, "a photo {of} a dog", "", "three cats", "one", "a blue night", "a", "b"]
QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on two "
    "key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
    "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n2. Overall Image Quality: "
    "Examine the visual quality of this image, including clarity, detail preservation, color accuracy, and overall aesthetic "
    "appeal.\nBased on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\n"
    "Text Caption: [%s]"
)
VISION = dict(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, patch_size=14, spatial_merge_size=2,
    window_size=56, fullatt_block_indexes=[1],
)  # fmt: skip
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]), max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip

reference = dict(seed=SEED, prompts=PROMPTS, image=[100, 150], new_tokens=NEW_TOKENS, gain=GAIN, scores=[], answers=[], logits=[])
with tempfile.TemporaryDirectory() as temporary:
    base = Path(temporary)
    ids = common.qwen_tokenizer(base, common.ANSWERS)
    special = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    special |= dict(image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"])
    special |= dict(bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"])
    config = Qwen2_5_VLConfig(vision_config=VISION, vocab_size=max(ids.values()) + 1, **TEXT, **special)
    model = Qwen2_5_VLForConditionalGeneration(config)
    config.save_pretrained(base)
    reference["config"] = json.loads((base / "config.json").read_text())
    reference["shapes"] = {name: list(value.shape) for name, value in model.state_dict().items()}
    weights = common.answer_weights(common.weights(reference["shapes"], SEED, GAIN), ids)
    print(model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}))
    model.eval()
    processor = dict(image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor")
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    (base / "chat_template.json").write_text(json.dumps(dict(chat_template=common.CHAT)))
    processor = AutoProcessor.from_pretrained(base, use_fast=False)
for prompt, image in zip(PROMPTS, common.pictures(len(PROMPTS), *reference["image"], SEED)):
    content = [dict(type="image", image=Image.fromarray(image)), dict(type="text", text=QUESTION % prompt)]
    messages = [dict(role="user", content=content)]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures, _ = process_vision_info(messages)
    inputs = processor(text=[text], images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        options = dict(output_logits=True, return_dict_in_generate=True, do_sample=False)
        generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)
    answer = processor.batch_decode(generated.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]
    reference["scores"].append(float(re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", answer)[1]) / 5)
    reference["answers"].append(answer)
    reference["logits"].append(generated.logits[0][0, [ids[answer] for answer in common.ANSWERS]].tolist())
    print(inputs.input_ids.shape, answer)
text = json.dumps(reference, separators=(",", ":")).replace("],", "],\n") + "\n"
(Path(__file__).resolve().parent / "unifiedreward.json").write_text(text)
