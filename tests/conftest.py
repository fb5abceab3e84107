"""A miniature of the full Stable Diffusion 3.5 with every part it has, T5 and dual attention too; only its VAE is trained."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores: one thread each, in the programs they start too
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import miniature
from miniature import pretrain


@pytest.fixture(scope="session")
def full_sd3(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer()
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127)), "▁a", "▁the", "▁sign", "▁horse"]
    t5_tokenizer = T5Tokenizer(vocab=[(piece, 0.0 if i < 3 else -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), d_model=128, d_kv=16, d_ff=64, num_layers=2, num_heads=4))
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        caption_projection_dim=64,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )
    # Untrained, the last layers are zero in diffusers and the velocity with them; a model that does nothing cannot learn.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    for block in transformer.transformer_blocks:
        block.norm1.linear.weight.data.mul_(6)
    # A random decoder's images hardly depend on the latents, so there would be nothing to learn either.
    vae = AutoencoderKL.from_pretrained(miniature.FOLDER / "vae")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=pretrain.build_text_encoder(tokenizer, 1),
        tokenizer=tokenizer,
        text_encoder_2=pretrain.build_text_encoder(tokenizer, 2),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )
    folder = tmp_path_factory.mktemp("full") / "sd3"
    pipe.save_pretrained(folder)
    return folder
