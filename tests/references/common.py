"""What a reference and its test share, the same numbers under any library version: weights and pictures from a seed."""

import json
import math

import numpy as np

WORDS = "a an the red green blue circle square of on two three cat dog sign says with and photo street at night".split()
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *",.!?-'", *LETTERS, *("##" + c for c in LETTERS), *WORDS[2:]]  # vocabulary
ANSWERS = [f"Final Score: {tenths / 10}" for tenths in range(10, 51)]
CHAT = (  # Qwen2-VL's chat template, which is Qwen2.5-VL's, for one image and one text
    "{% for message in messages %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def weights(shapes, seed, gain):
    """{name: float32 array} of {name: shape}, drawn in the order of the names, norms near 1."""
    rng, result = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes.items()):
        scale = 0.2 if len(shape) < 2 else gain / math.sqrt(math.prod(shape[1:]))
        values = rng.standard_normal(tuple(shape), dtype=np.float32) * np.float32(scale)
        result[name] = values + 1 if len(shape) == 1 and name.endswith("weight") else values
    return result


def pictures(n, height, width, seed):
    """(n, height, width, 3) uint8: a colour gradient, a disc and some noise each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / min(height, width)
    result = []
    for _ in range(n):
        slope, colour, disc, (cy, cx) = rng.random((2, 3)), rng.random(3), rng.random(3), rng.random(2)
        image = (colour + y[..., None] * slope[0] + x[..., None] * slope[1]) / 3
        image = np.where(((y - cy) ** 2 + (x - cx) ** 2 < 0.1)[..., None], disc, image)
        result.append((image * 220 + rng.random((height, width, 3)) * 35).astype(np.uint8))
    return np.stack(result)


def qwen_tokenizer(folder, words=()):
    """Writes a Qwen2 tokenizer: bytes, a few merges, the special tokens of Qwen2-VL, and `words` that are tokens of their own."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of the bytes
    names = [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
    merges = "Ġ t,h e,Ġ a,i n,e r,o n,r e,Ġt he,Ġ s,a t,e n,Ġ c,i t,i s,o r,e s,Ġ i,in g,Ġ o,t i".split(",")
    names += [merge.replace(" ", "") for merge in merges]
    special = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()
    added = [(f"<|{name}|>", True) for name in special] + [(word, False) for word in words]
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)
    config = dict(
        tokenizer_class="Qwen2Tokenizer",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        added_tokens_decoder={len(names) + i: dict(flags, content=c, special=s) for i, (c, s) in enumerate(added)},
    )
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {content: len(names) + i for i, (content, _) in enumerate(added)}


def answer_weights(weights, ids):
    """`weights` of a model that can only say an ANSWER: the other rows of its last layer are zero."""
    others = [row for row in range(len(weights["lm_head.weight"])) if row not in [ids[answer] for answer in ANSWERS]]
    weights["lm_head.weight"][others] = 0
    return weights
