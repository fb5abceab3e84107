"""The reward networks give the numbers of the authors' own code, tests/references, which the scripts there made."""

import json
from pathlib import Path

import pytest
import torch
from references import common
from safetensors.torch import save_file

from judges import hpsv3, imagereward, unifiedreward

REFERENCES = Path(__file__).parent / "references"
JUDGES = imagereward, hpsv3, unifiedreward
LIMIT = 2e-6


def read(name):
    """(reference, weights {name: tensor} in the authors' layout, images (B, 3, H, W), scores (B,))."""
    reference = json.loads((REFERENCES / f"{name}.json").read_text())
    weights = common.weights(reference["shapes"], reference["seed"], reference["gain"])
    pictures = common.pictures(len(reference["prompts"]), *reference["image"], reference["seed"])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    return reference, {name: torch.from_numpy(value) for name, value in weights.items()}, images, torch.tensor(reference["scores"])


def error(scores, reference):
    assert scores.shape == reference.shape and scores.dtype == torch.float32 and scores.device.type == "cpu"
    return (scores - reference).abs().max()


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder for a judge's files, where it looks for them."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda checkpoint, name: f"{checkpoint}/{name}")
    for judge in JUDGES:
        judge.load.cache_clear()
        monkeypatch.setattr(judge, "CHECKPOINT", str(tmp_path))
    yield tmp_path
    for judge in JUDGES:
        judge.load.cache_clear()


@pytest.fixture
def tiny_imagereward(local, monkeypatch):
    reference, weights, images, scores = read("imagereward")
    positions = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}  # the authors' file has them, too
    torch.save(weights | positions, local / "ImageReward.pt")
    (local / "vocab.txt").write_text("\n".join(common.BERT) + "\n")
    monkeypatch.setattr(imagereward, "TOKENIZER", str(local))
    width, depth, heads = (reference["vision"][key] for key in ("embed_dim", "depth", "num_heads"))
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads)
    monkeypatch.setattr(imagereward, "VISION", imagereward.VISION | sizes)
    monkeypatch.setattr(imagereward, "TEXT", reference["text"] | dict(encoder_hidden_size=width, bos_token_id=2, sep_token_id=3))
    return images, reference["prompts"], scores


def test_imagereward_gives_the_authors_numbers_in_any_batch(tiny_imagereward):
    images, prompts, scores = tiny_imagereward
    assert error(imagereward.score(images, prompts), scores) < LIMIT
    assert error(imagereward.score(images.repeat(6, 1, 1, 1), prompts * 6), scores.repeat(6)) < LIMIT  # 18, more than a batch
    assert error(imagereward.score(images.flip(0), prompts), scores) > 100 * LIMIT
    assert error(imagereward.score(images, prompts[::-1]), scores) > 100 * LIMIT


@pytest.mark.parametrize(
    "name, value",
    [
        ("TEXT", dict(num_attention_heads=8)),  # BlipTextConfig's default
        ("VISION", dict(layer_norm_eps=1e-5)),  # BlipVisionConfig's default
        ("LENGTH", 34),
        ("MEAN", 0.1672),
        ("STD", 1.0334),
        ("RENAMES", {".norm1.": ".layer_norm2.", ".norm2.": ".layer_norm1."}),
    ],
)
def test_a_slightly_wrong_imagereward_is_found(name, value, tiny_imagereward, monkeypatch):
    images, prompts, scores = tiny_imagereward
    right = getattr(imagereward, name)
    monkeypatch.setattr(imagereward, name, right | value if isinstance(value, dict) else value)
    assert error(imagereward.score(images, prompts), scores) > LIMIT


@pytest.fixture
def tiny_hpsv3(local, monkeypatch):
    reference, weights, images, scores = read("hpsv3")
    save_file(weights, local / "HPSv3.safetensors")
    common.qwen_tokenizer(local)
    (local / "config.json").write_text(json.dumps(reference["config"]))
    monkeypatch.setattr(hpsv3, "BASE", str(local))
    monkeypatch.setattr(hpsv3, "DTYPE", torch.float32)
    return images, reference["prompts"], scores, torch.tensor(reference["rounded"])


def test_hpsv3_gives_the_authors_numbers(tiny_hpsv3):
    images, prompts, scores, _ = tiny_hpsv3
    assert error(hpsv3.score(images, prompts), scores) < LIMIT


def test_hpsv3_in_bfloat16_rounds_what_the_authors_round(tiny_hpsv3, monkeypatch):
    images, prompts, _, rounded = tiny_hpsv3
    for parameter in hpsv3.load()[0]["model"].parameters():
        parameter.data = parameter.bfloat16().float()
    assert error(hpsv3.score(images, prompts), rounded) > LIMIT  # the rotary frequencies are not parameters
    monkeypatch.setattr(hpsv3, "DTYPE", torch.bfloat16)
    hpsv3.load.cache_clear()
    hpsv3.load()[0].float()  # rounded before; the sums stay exact, so that processors agree
    assert error(hpsv3.score(images, prompts), rounded) < LIMIT


@pytest.mark.parametrize("name", ["positions", "QUESTION", "PIXELS"])
def test_a_slightly_wrong_hpsv3_is_found(name, tiny_hpsv3, monkeypatch):
    images, prompts, scores, _ = tiny_hpsv3
    model = hpsv3.load()[0]["model"]

    def rows_and_columns(input_ids, position_ids, right=model.forward, **kwargs):  # Qwen2-VL's own positions
        return right(input_ids, mm_token_type_ids=(input_ids == model.config.image_token_id).int(), **kwargs)

    if name == "positions":
        monkeypatch.setattr(model, "forward", rows_and_columns)
    elif name == "QUESTION":
        monkeypatch.setattr(hpsv3, "QUESTION", hpsv3.QUESTION.replace("give a overall", "give an overall"))
    else:
        monkeypatch.setattr(hpsv3, "PIXELS", 240 * 28 * 28)
        hpsv3.load.cache_clear()
    assert error(hpsv3.score(images, prompts), scores) > LIMIT


@pytest.fixture
def tiny_unifiedreward(local, monkeypatch):
    reference, weights, images, scores = read("unifiedreward")
    ids = common.qwen_tokenizer(local, common.ANSWERS)
    save_file(common.answer_weights(weights, ids), local / "model.safetensors", metadata={"format": "pt"})
    (local / "config.json").write_text(json.dumps(reference["config"]))
    (local / "preprocessor_config.json").write_text(json.dumps(dict(image_processor_type="Qwen2VLImageProcessor")))
    monkeypatch.setattr(unifiedreward, "NEW_TOKENS", reference["new_tokens"])
    model, tokenizer, _ = unifiedreward.load()
    answers, logits = [], []

    def recorded(right=model.generate, **options):
        generated = right(**options, output_logits=True, return_dict_in_generate=True)
        answers.extend(tokenizer.batch_decode(generated.sequences[:, options["input_ids"].shape[1] :], skip_special_tokens=True))
        logits.append(generated.logits[0][:, [ids[answer] for answer in common.ANSWERS]])
        return generated.sequences

    monkeypatch.setattr(model, "generate", recorded)

    def run():
        """(scores (B,), answers, largest error of the logits at an answer's first token)"""
        ours = unifiedreward.score(images, reference["prompts"])
        return ours, answers, error(torch.cat(logits), torch.tensor(reference["logits"]))

    return run, reference["answers"], scores, recorded


def test_unifiedreward_gives_the_authors_answers(tiny_unifiedreward):
    run, answers, scores, _ = tiny_unifiedreward
    ours, our_answers, difference = run()
    assert our_answers == answers and len(set(answers)) > 6
    assert error(ours, scores) < LIMIT and difference < 1e-5


@pytest.mark.parametrize("name", ["positions", "QUESTION", "padding"])
def test_a_slightly_wrong_unifiedreward_is_found(name, tiny_unifiedreward, monkeypatch):
    run, answers, _, right = tiny_unifiedreward
    model, tokenizer, _ = unifiedreward.load()
    if name == "positions":
        monkeypatch.setattr(model, "generate", lambda mm_token_type_ids, **options: right(**options))
    elif name == "QUESTION":
        monkeypatch.setattr(unifiedreward, "QUESTION", unifiedreward.QUESTION.replace("1 to 5", "1 to 10"))
    else:
        tokenizer.padding_side = "right"
    _, our_answers, difference = run()
    assert difference > 0.1 and our_answers != answers


@pytest.mark.parametrize(
    "answer, wanted",
    [("circle: 1\nFinal Score: 3.75", 3.75), ("Final Score:4", 4), ("Final Score: 9", 0), ("no idea", 0), ("Final Score: x", 0)],
)
def test_final_score(answer, wanted):
    assert unifiedreward.final_score(answer) == wanted


@pytest.mark.parametrize("judge", JUDGES)
def test_missing_files_are_an_os_error(judge, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(judge, "CHECKPOINT", "nobody/nothing")
    judge.load.cache_clear()
    with pytest.raises(OSError):
        judge.load()


@pytest.mark.parametrize(
    "judge, function",
    [(hpsv3, "AutoModel.from_config"), (unifiedreward, "Qwen2_5_VLForConditionalGeneration.from_pretrained")],
)
def test_too_little_memory_is_one_sentence(judge, function, request, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate")

    request.getfixturevalue(f"tiny_{judge.__name__.split('.')[1]}")
    judge.load.cache_clear()
    monkeypatch.setattr(f"transformers.{function}", full)
    with pytest.raises(torch.OutOfMemoryError, match="needs 1. GB of free GPU memory"):
        judge.load()
