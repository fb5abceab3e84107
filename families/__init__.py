"""The models: a file for each family holds what is particular to it; here is what all share: loading, LoRA, compiling.

A family's file has, under the same names,

MODELS        names for --model and the pipelines they stand for
PIPELINE      diffusers' class of those pipelines
PRESET        the settings that its models start from, over the defaults of the scripts, which are the miniature's
LORA_TARGETS  ends of the names of the matrices that learn
resolutions   range of the heights and widths that fit; its step is the side of an image token, in pixels
contrasts     whether --guidance is classifier-free, which takes a second row with the empty prompt
encode        one prompt's rows (1, L, D) and what the model is told of it as a whole (1, E)
velocity      one call of the transformer, for latents (B, C, H, W)
schedule      the pipeline's own noise levels (T + 1,)
to_vae        latents as the VAE decodes them
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns at import that torchvision is missing
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import miniature
from families import flux, klein, sd3

FAMILIES = {family.PIPELINE: family for family in (sd3, flux, klein)}
MODELS = {"tiny": str(miniature.FOLDER)} | sd3.MODELS | flux.MODELS | klein.MODELS
LORA_FILE = "pytorch_lora_weights.safetensors"


def of(pipe):
    """The family of a pipeline."""
    return FAMILIES[type(pipe).__name__]


def of_model(model):
    """The family of a --model, by name or by its model_index.json; ValueError says in a sentence why there is none."""
    for family in FAMILIES.values():
        if model in family.MODELS:
            return family
    name = MODELS.get(model, model)
    with explained(name):
        kind = DiffusionPipeline.load_config(name).get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{name} holds a {kind}; the families known here are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


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


def load_pipeline(args):
    """The pipeline with a fresh LoRA on its transformer: frozen weights in args.dtype, LoRA weights in float32.

    ValueError says in a sentence why the weights cannot be loaded, or that args.resolution does not fit them.
    """
    name, dtype, family = MODELS.get(args.model, args.model), getattr(torch, args.dtype), of_model(args.model)
    # On a GPU the text encoders are too large for float32 (T5 alone 19 GB); on a CPU there is room for exactness.
    dtypes = {"vae": torch.float32, "transformer": dtype, "default": torch.float32 if args.device == "cpu" else dtype}
    with explained(name):
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtypes, use_safetensors=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    fitting, size = family.resolutions(pipe), args.resolution or pipe.default_sample_size * pipe.vae_scale_factor
    if size not in fitting:
        raise ValueError(
            f"--resolution {size} must be a multiple of {fitting.step} up to {fitting[-1]} for this model, or 0 for its own"
        )
    pipe.image_tokens = (size // fitting.step) ** 2  # of one image, in the transformer
    if args.shift:
        constant = dict(shift=args.shift, use_dynamic_shifting=False)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **constant)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, init_lora_weights="gaussian", target_modules=family.LORA_TARGETS)
    pipe.transformer.add_adapter(lora)
    cast_training_params(pipe.transformer, torch.float32)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.to(args.device)
    pipe.vae.to(args.device)
    if args.device != "cpu" and size >= 256:
        pipe.vae.enable_slicing()  # decodes one image at a time: a large one's activations are what fills a GPU's memory
    return pipe


def compile_blocks(transformer):
    """Compiles the transformer's repeated blocks: one graph serves all that are alike, in batches of any size.

    The limit of recompilations (inner and last block, LoRA on and off) is given to `compile` itself: dynamo's settings hold
    for one thread, and on a GPU gradient checkpointing runs the blocks again in autograd's.
    """
    names = transformer._repeated_blocks or ["JointTransformerBlock"]
    for block in transformer.modules():
        if type(block).__name__ in names:
            block.compile(fullgraph=True, dynamic=True, recompile_limit=32)  # past it fullgraph raises, and is not silently eager
    transformer.blocks_are_compiled = True


@contextmanager
def adapter_off(pipe):
    """The reference policy: the same model without its LoRA."""
    pipe.transformer.disable_adapters()
    try:
        yield
    finally:
        pipe.transformer.enable_adapters()


def lora_state(pipe):
    """{name: weight} of the LoRA, on the CPU."""
    return {name: p.detach().cpu() for name, p in get_peft_model_state_dict(pipe.transformer).items()}


def set_lora(pipe, weights):
    """Gives the LoRA the weights of another, named as in `lora_state`; a ValueError says that they are of other layers."""
    if set_peft_model_state_dict(pipe.transformer, weights).unexpected_keys:
        raise ValueError("other layers")


def load_lora(pipe, folder):
    """Gives the LoRA the weights of a run's folder; raises what the file or its fit is wrong with."""
    weights = load_file(Path(folder) / LORA_FILE)
    set_lora(pipe, {name.removeprefix("transformer."): weight for name, weight in weights.items()})


def save_lora(pipe, path):
    """Writes a file that `load_lora_weights` of the family's stock pipeline reads."""
    # diffusers' own file has two metadata entries, which safetensors writes in random order: other bytes every time. With
    # this one alone, which holds the LoRA's alpha, the same weights are the same bytes.
    config = {f"transformer.{name}": value for name, value in pipe.transformer.peft_config["default"].to_dict().items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True, default=sorted)}
    pipe.save_lora_weights(
        path.parent,
        transformer_lora_layers=lora_state(pipe),
        weight_name=path.name,
        # not save_file, whose own temporary file would outlive a kill
        save_function=lambda weights, path: Path(path).write_bytes(save(weights, metadata)),
    )
