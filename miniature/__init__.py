"""The small world that runs without a GPU: its shapes, its trained weights in tiny-sd3/, and how they were made."""

import json
from pathlib import Path

from miniature import shapes

FOLDER = Path(__file__).parent / "tiny-sd3"


def is_miniature(model):
    """Whether a --model is the miniature or a folder of its kind: a transformer whose positions end at 64 x 64 pixels."""
    try:
        config = json.loads((FOLDER if model == "tiny" else Path(model)).joinpath("transformer", "config.json").read_text())
        return config["pos_embed_max_size"] * config["patch_size"] * 8 == shapes.SIZE  # the autoencoder halves three times
    except (OSError, ValueError, KeyError, TypeError):
        return False
