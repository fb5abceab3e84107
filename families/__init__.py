"""The families of models: a file each holds what is particular to one, under the same names; sampler.py holds the rest.

NAME          of the preset in arguments.py
LORA_TARGETS  ends of the names of the matrices that learn
resolutions   range of the heights and widths that fit; its step is the side of an image token, in pixels
contrasts     whether --guidance is classifier-free, which takes a second row with the empty prompt
encode        one prompt's rows (1, L, D) and what the model is told of it as a whole (1, E)
velocity      one call of the transformer, for latents (B, C, H, W)
schedule      the pipeline's own noise levels (T + 1,)
to_vae        latents as the VAE decodes them
"""

from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from families import flux, klein, sd3

FAMILIES = {"StableDiffusion3Pipeline": sd3, "FluxPipeline": flux, "Flux2KleinPipeline": klein}  # by diffusers' class


def of(pipe):
    """The family of a pipeline."""
    return FAMILIES[type(pipe).__name__]


def find(name):
    """The family of a folder or hub id, by its model_index.json alone; ValueError says in a sentence why there is none."""
    with explained(name):
        kind = DiffusionPipeline.load_config(name).get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{name} holds a {kind}; the families known here are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def load(name, dtypes):
    """The pipeline of a folder or hub id, its modules in dtypes, {name or "default": dtype}; ValueError as in `find`."""
    find(name)
    with explained(name):
        return DiffusionPipeline.from_pretrained(name, dtype=dtypes, use_safetensors=True)


@contextmanager
def explained(name):
    """Turns what diffusers raises when a folder or hub id cannot be read into a ValueError of one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if Path(name).is_dir() or not isinstance(error, OSError):
            raise ValueError(f"{name} could not be loaded as a pipeline of safetensors files: {error}") from None
        raise ValueError(
            f"the weights of {name}, as safetensors, are neither on disk nor to be had ({type(error).__name__}); accept "
            f"their licence on https://huggingface.co/{name}, run `hf auth login`, or take --model tiny, which needs no download"
        ) from None
