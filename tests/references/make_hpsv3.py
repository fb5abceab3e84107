"""Writes hpsv3.json: scores of the authors' own HPSv3RewardInferencer, tiny and with weights from a seed.

    python3.11 -m venv venv && . venv/bin/activate
    pip install torch==2.4.1 torchvision==0.19.1 transformers==4.45.2 trl==0.11.4 peft==0.13.2 accelerate==1.0.1 datasets==2.21.0
    pip install rich fire matplotlib pandas omegaconf tensorboard && pip install --no-deps hpsv3==1.0.0
    python tests/references/make_hpsv3.py

Only sizes, vocabulary and device are changed, and precision: "scores" is float32, "rounded" has weights and buffers rounded to
their bfloat16. Question, preprocessing, positions and formulas are theirs.
"""

import json
import tempfile
from pathlib import Path

import common
import hpsv3.inference
import torch
import yaml
from hpsv3.inference import HPSv3RewardInferencer
from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

SEED, GAIN = 0, 0.8
PROMPTS = ["a red circle on the street", "The sign says: two cats! " * 5, "a photo {of} a dog", "", "three cats"]
VISION = dict(depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=64, patch_size=14, spatial_merge_size=2)
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]), max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip

folder = Path(__file__).resolve().parent
reference = dict(seed=SEED, gain=GAIN, prompts=PROMPTS, image=[250, 300])
images = [Image.fromarray(image) for image in common.pictures(len(PROMPTS), *reference["image"], SEED)]
with tempfile.TemporaryDirectory() as temporary:
    base = Path(temporary)
    ids = common.qwen_tokenizer(base)
    special = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    special |= dict(image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"])
    vocabulary = max(ids.values()) + 8  # more than the tokenizer has, as in the real one
    special |= dict(bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"])
    config = Qwen2VLConfig(vision_config=VISION, vocab_size=vocabulary, **TEXT, **special)
    Qwen2VLForConditionalGeneration(config).save_pretrained(base)
    reference["config"] = json.loads((base / "config.json").read_text())
    processor = dict(image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2VLProcessor")
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    (base / "chat_template.json").write_text(json.dumps(dict(chat_template=common.CHAT)))
    settings = yaml.safe_load((hpsv3.inference._MODEL_CONFIG_PATH / "HPSv3_7B.yaml").read_text())
    for dtype in ("float32", "bfloat16"):
        bf16 = dtype == "bfloat16"
        settings |= dict(model_name_or_path=temporary, torch_dtype=dtype, bf16=bf16, use_cpu=True, disable_flash_attn2=True)
        (base / "config.yaml").write_text(yaml.safe_dump(settings))
        if not bf16:  # the shapes of their model, its vocabulary cut to the tokenizer's
            config.vocab_size = max(ids.values()) + 2
            model = Qwen2VLRewardModelBT(config, output_dim=2, rm_head_type="ranknet")
            reference["shapes"] = {name: list(value.shape) for name, value in model.state_dict().items()}
            weights = common.weights(reference["shapes"], SEED, GAIN)
            save_file({name: torch.from_numpy(value) for name, value in weights.items()}, base / "HPSv3.safetensors")
        inferencer = HPSv3RewardInferencer(str(base / "config.yaml"), str(base / "HPSv3.safetensors"), device="cpu")
        inferencer.model.float()  # a CPU rounds bfloat16's sums differently: the weights and buffers are rounded, the sums not
        with torch.no_grad():
            rewards = inferencer.reward(images, PROMPTS)
        reference["rounded" if bf16 else "scores"] = rewards[:, 0].tolist()
        print(dtype, rewards)
(folder / "hpsv3.json").write_text(json.dumps(reference, separators=(",", ":")).replace("],", "],\n") + "\n")
