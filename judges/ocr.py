"""How much of the text that a prompt quotes can be read in the image, by RapidOCR: Flow-GRPO's text reward."""

import functools
import re

import numpy as np
import torch

from judges import to_uint8

SURFACES = (
    "a shop sign that reads", "a neon sign saying", "a birthday cake with the words", "a book titled", "a chalkboard with the text",
    "a t-shirt printed with", "a road sign that says", "a poster with the headline", "graffiti on a wall spelling", "a mug with",
)  # fmt: skip
WORDS = (
    "hello world,open late,fresh bread,keep left,good morning,night owl,sale today,no entry,read more,wild river,stay curious,"
    "coffee first,lost and found,blue moon,thank you,mind the gap,summer camp,quiet please,happy birthday,one way"
).split(",")


def template_prompts():
    """Surface -> prompts that quote the words to be written on it."""
    return {surface: [f'{surface} "{words}"' for words in WORDS] for surface in SURFACES}


def quoted(prompt):
    """The text that a prompt wants to see written: what stands in its first pair of double quotes."""
    match = re.search(r'"\s*([^"\s][^"]*)"', prompt)
    if not match:
        raise ValueError(f"prompt '{prompt}' has no text in double quotes, which is what --reward ocr looks for in the image")
    return match[1]


@functools.cache
def load():
    import rapidfuzz.distance
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "error"}), rapidfuzz.distance.Levenshtein.distance


def text_score(found, wanted):
    """1 - edit distance / length of the wanted text, at least 0, without case and spaces; 1 if it is found in more (Flow-GRPO)."""
    found, wanted = ("".join(text.lower().split()) for text in (found, wanted))
    distance = 0 if wanted in found else load()[1](found, wanted)
    return 1 - min(distance / len(wanted), 1)


def score(images, prompts):
    """`text_score` of the text that RapidOCR reads in the image, against the text quoted in the prompt."""
    read = lambda image: "".join(load()[0](np.ascontiguousarray(image[..., ::-1])).txts or ())  # it takes BGR
    return torch.tensor([text_score(read(image), quoted(prompt)) for image, prompt in zip(to_uint8(images), prompts)])
