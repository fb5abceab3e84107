"""The small world that runs without a GPU: its shapes, its trained weights in tiny-sd3/, and how they were made."""

from pathlib import Path

FOLDER = Path(__file__).parent / "tiny-sd3"


def is_miniature(model):
    """Whether a --model is the miniature: `tiny`, or a folder called tiny-sd3, as pretrain.py makes it."""
    return Path(model).name in ("tiny", "tiny-sd3")
