"""Untrained pipelines of every family, at full size or as small as asked: for measuring and testing without a download."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from miniature import pretrain

VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16, sample_size=1024,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
FULL = {  # configs of the transformer and of the VAE
    "sd3": (
        dict(
            sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
            out_channels=16, joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        ),
        VAE | dict(scaling_factor=1.5305, shift_factor=0.0609),
    ),
    "flux": (
        dict(num_layers=19, num_single_layers=38, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True),
        VAE | dict(scaling_factor=0.3611, shift_factor=0.1159),
    ),
    "klein": (
        dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False),
        {},
    ),
}  # fmt: skip
SMALL = {  # changes of those of the transformer, to try on a small model what is meant for a large one
    "sd3": dict(
        num_layers=3, num_attention_heads=2, attention_head_dim=16, caption_projection_dim=32, joint_attention_dim=128,
        pooled_projection_dim=64, dual_attention_layers=(0,),
    ),
    "flux": dict(
        num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32, pooled_projection_dim=16,
    ),
    "klein": dict(
        num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=48,
    ),
}  # fmt: skip
SMALL_VAE = dict(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
CLIP_L = (CLIPTextModelWithProjection, CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
))  # fmt: skip
CLIP_BIGG = (CLIPTextModelWithProjection, CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
))  # fmt: skip
T5_XXL = (T5EncoderModel, T5Config(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
))  # fmt: skip
QWEN3_4B = (Qwen3ForCausalLM, Qwen3Config(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
))  # fmt: skip
TEXT_ENCODERS = {"sd3": (CLIP_L, CLIP_BIGG, T5_XXL), "flux": (CLIP_L, T5_XXL), "klein": (QWEN3_4B,)}  # the real ones' configs


def transformer(family, **changes):
    """An untrained transformer of the family's full size, but for `changes` of its config."""
    kind = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel, "klein": Flux2Transformer2DModel}[family]
    model = kind(**FULL[family][0] | changes)
    if model.proj_out.weight.device.type != "meta":
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)  # diffusers makes SD3's zero, and all gradients with it
    return model


def vae(family, **changes):
    """An untrained autoencoder of the family's full size, but for `changes` of its config."""
    return (AutoencoderKLFlux2 if family == "klein" else AutoencoderKL)(**FULL[family][1] | changes)


def text_encoders(family):
    """The family's text encoders in their full size; on the meta device, for their size alone."""
    with torch.device("meta"):
        return [kind(config) for kind, config in TEXT_ENCODERS[family]]


def clip(kind, width, projection):
    """A CLIP text encoder of one layer and its tokenizer."""
    tokenizer = pretrain.build_tokenizer()
    tokenizer.model_max_length = 77  # as long as the real captions
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, projection_dim=projection, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config), tokenizer


def t5(width):
    """A T5 of one layer, whose tokenizer reads letter by letter."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)), tokenizer


def qwen3(width):
    """A thin Qwen3 as deep as the layers that klein reads (the 9th, 18th and 27th), whose tokenizer reads byte by byte."""
    vocabulary = {piece: i for i, piece in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=28, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return Qwen3ForCausalLM(config), tokenizer


def pipeline(family, transformer, vae):
    """The family's pipeline around a transformer and an autoencoder, with text encoders that are as wide as they need to be."""
    config = transformer.config
    parts = dict(transformer=transformer, vae=vae)
    if family == "sd3":
        widths = 3 * config.pooled_projection_dim // 8, 5 * config.pooled_projection_dim // 8  # of 2048: 768 and 1280
        parts["text_encoder"], parts["tokenizer"] = clip(CLIPTextModelWithProjection, 64, widths[0])
        parts["text_encoder_2"], parts["tokenizer_2"] = clip(CLIPTextModelWithProjection, 64, widths[1])
        parts["text_encoder_3"], parts["tokenizer_3"] = t5(config.joint_attention_dim)
        return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if family == "flux":
        parts["text_encoder"], parts["tokenizer"] = clip(CLIPTextModel, config.pooled_projection_dim, 64)
        parts["text_encoder_2"], parts["tokenizer_2"] = t5(config.joint_attention_dim)
        return FluxPipeline(scheduler=scheduler, **parts)
    parts["text_encoder"], parts["tokenizer"] = qwen3(config.joint_attention_dim // 3)
    return Flux2KleinPipeline(scheduler=scheduler, **parts)


def random_model(family, folder, small=False):
    """Saves an untrained bfloat16 pipeline of the family's full size, or a small one, with thin text encoders."""
    transformer_changes, vae_changes = (SMALL[family], SMALL_VAE) if small else ({}, {})
    torch.set_default_dtype(torch.bfloat16)  # never whole in float32, for which a CPU's memory may lack the room
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = transformer(family, **transformer_changes).bfloat16()
    finally:
        torch.set_default_dtype(torch.float32)
    pipeline(family, model, vae(family, **vae_changes)).save_pretrained(folder)
