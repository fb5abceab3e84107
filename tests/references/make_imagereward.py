"""Writes imagereward.json: scores of the authors' own ImageReward, tiny and with weights from a seed.

    python3.11 -m venv venv && . venv/bin/activate
    pip install torch==2.4.1 torchvision==0.19.1 transformers==4.45.2 setuptools wheel
    pip install --no-deps --no-build-isolation image-reward==1.5 timm==0.6.13 fairscale==0.4.13
    python tests/references/make_imagereward.py

Only sizes are changed: layers, widths and vocabulary. Image size, preprocessing, prompt length and formulas are theirs.
"""

import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import common
import torch
from PIL import Image

for name in ("ImageReward", "ImageReward.models"):  # without their __init__, which imports other scores and training
    package = types.ModuleType(name)
    package.__path__ = [str(Path(importlib.util.find_spec("timm").origin).parents[1] / name.replace(".", "/"))]
    sys.modules[name] = package
from ImageReward.ImageReward import MLP, ImageReward  # noqa: E402
from ImageReward.models.BLIP import blip_pretrain  # noqa: E402
from ImageReward.models.BLIP.vit import VisionTransformer  # noqa: E402

SEED, GAIN = 0, 0.8
VISION = dict(embed_dim=48, depth=2, num_heads=3)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(common.BERT) + 2)
PROMPTS = ["a red circle on the street", "The sign says: two cats!", "of a dog " * 20]  # the last one is too long
IMAGE = [250, 300]  # even margins when cut to a square: torchvision rounds odd ones the other way

folder = Path(__file__).resolve().parent
with tempfile.TemporaryDirectory() as temporary:
    os.chdir(temporary)
    Path("bert-base-uncased").mkdir()  # found by their from_pretrained("bert-base-uncased")
    Path("bert-base-uncased/vocab.txt").write_text("\n".join(common.BERT) + "\n")
    config = dict(TEXT, max_position_embeddings=512, layer_norm_eps=1e-12, pad_token_id=0, hidden_act="gelu")
    Path("med_config.json").write_text(json.dumps(config | dict(add_cross_attention=True, model_type="bert")))
    blip_pretrain.create_vit = lambda vit, size, *_: (VisionTransformer(size, **VISION), VISION["embed_dim"])
    model = ImageReward("med_config.json")
model.mlp = MLP(TEXT["hidden_size"])
shapes = {name: list(value.shape) for name, value in model.state_dict().items() if value.is_floating_point()}
weights = {name: torch.from_numpy(value) for name, value in common.weights(shapes, SEED, GAIN).items()}
print(model.load_state_dict(weights, strict=False))
model.eval()
images = common.pictures(len(PROMPTS), *IMAGE, SEED)
with torch.no_grad():
    scores = [model.score(prompt, Image.fromarray(image)) for prompt, image in zip(PROMPTS, images)]
print(scores)
reference = dict(seed=SEED, gain=GAIN, vision=VISION, text=TEXT, prompts=PROMPTS, image=IMAGE, scores=scores, shapes=shapes)
(folder / "imagereward.json").write_text(json.dumps(reference, separators=(",", ":")).replace("],", "],\n") + "\n")
