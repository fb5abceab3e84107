"""Text as a model sees it: each prompt is encoded once and kept, and the text encoders are on the device only meanwhile."""

import math
from dataclasses import dataclass

import torch

import families

TEXT_CACHE = 4 << 30  # bytes of encoded prompts kept in CPU memory; a prompt of klein's has 8 MB


@dataclass
class Text:
    """Encoded prompts, a row each, and the empty prompt that classifier-free guidance contrasts them with."""

    embeds: torch.Tensor  # (P, L, D)
    pooled: torch.Tensor  # (P, E)
    empty_embeds: torch.Tensor  # (1, L, D)
    empty_pooled: torch.Tensor  # (1, E)

    def rows(self, index):
        return Text(self.embeds[index], self.pooled[index], self.empty_embeds, self.empty_pooled)


@torch.no_grad()
def encode_new(pipe, prompts, args, room):
    """Encodes prompts that are new, in their order, while the kept have less than `room` bytes; the encoders are on the device."""
    encoded = pipe.__dict__.setdefault("encoded_prompts", {})  # prompt -> (embeds (L, D), pooled (E,)), on the CPU
    encoders = [m for name, m in pipe.components.items() if name.startswith("text_encoder") and m is not None]
    for encoder in encoders:
        encoder.to(args.device)
    used = sum(t.nbytes for tensors in encoded.values() for t in tensors)
    for prompt in ["", *prompts]:  # one by one: rounding depends on a batch's size, and a resumed run knows other prompts already
        if prompt not in encoded and used < room:
            encoded[prompt] = [t[0].cpu() for t in families.of(pipe).encode(pipe, prompt, args.text_length, args.device)]
            used += sum(t.nbytes for t in encoded[prompt])
    for encoder in encoders if args.device != "cpu" else ():
        encoder.to("cpu")


def encode_ahead(pipe, prompts, args):
    """Encodes all prompts of a run, in the order of their use; the text encoders are dropped if there was room for all."""
    encode_new(pipe, prompts, args, TEXT_CACHE)
    if all(prompt in pipe.encoded_prompts for prompt in prompts):
        pipe.register_modules(**{name: None for name in pipe.components if name.startswith("text_encoder")})


def encode(pipe, prompts, args):
    """Text of P prompts, each encoded once."""
    encoded = pipe.__dict__.setdefault("encoded_prompts", {})
    if any(p not in encoded for p in ["", *prompts]):
        if sum(t.nbytes for tensors in encoded.values() for t in tensors) > TEXT_CACHE:
            encoded.clear()
        encode_new(pipe, prompts, args, math.inf)
    rows = [torch.stack(t).to(args.device) for t in zip(*(encoded[p] for p in prompts))]
    return Text(*rows, *(t[None].to(args.device) for t in encoded[""]))
