"""GenEval's benchmark: the 553 published prompts, made of their requests by its templates, and what papers score on them."""

import json
from pathlib import Path

from judges.geneval import NUMBERS, Request, parse, published_plural, with_article

IMAGES = 4  # of a prompt
REQUESTS = {  # task -> requests, with the names and in the order of the published file, which geneval_553.json is made of
    task: [[Request(*clause) for clause in request] for request in requests]
    for task, requests in json.loads(Path(__file__).with_name("geneval_553.json").read_text("utf-8"))["requests"].items()
}
PUBLISHED = {  # overall, then, where the paper tells them, the tasks in this order
    "SD3.5-M": (0.63, 0.98, 0.78, 0.50, 0.81, 0.24, 0.52),  # this and the next: Flow-GRPO, table 1
    "Flow-GRPO": (0.95, 1.00, 0.99, 0.95, 0.92, 0.99, 0.86),
    "FLUX.1": (0.66,),  # this and the next: GCPO, table 2
    "GRPO": (0.67,),
    "GCPO": (0.69,),
    "weighted GCPO": (0.67,),
}
NOTE = (
    "Close to the published protocol, not the same: transformers' Mask2Former is another training of mmdet's architecture (46.3\n"
    "against 46.1 mask AP). SD3.5-M and Flow-GRPO are as in arXiv 2505.05470; FLUX.1 and what was trained from it in 2510.21583."
)


def sentence(request):
    """The prompt of a request, word for word as published."""
    words = {count: word for word, count in NUMBERS.items()}
    phrases = [
        f"{words[count]} {published_plural(name)}" if count > 1 else with_article(f"{colour} {name}" if colour else name)
        for name, count, colour, _ in request
    ]
    relation = request[-1].relation
    return "a photo of " + (f"{phrases[1]} {relation} {phrases[0]}" if relation else " and ".join(phrases))


def meaning(request):
    """What a request asks for, whichever object it names first: "a dog left of a cat" is "a cat right of a dog"."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    first, *rest = request
    return frozenset([*rest, first._replace(relation=opposite[request[-1].relation])])


PROMPTS = {task: [sentence(request) for request in requests] for task, requests in REQUESTS.items()}
MEANINGS = {meaning(request) for requests in REQUESTS.values() for request in requests}


def holds(prompt):
    """Whether the benchmark asks for what a prompt of GenEval's templates asks for."""
    return meaning(parse(prompt)) in MEANINGS


def left_out(train, held_out):
    """Both halves of a prompt set, the training prompts without the benchmark's, nor a category that they were all of."""
    left = {category: [p for p in prompts if not holds(p)] for category, prompts in train.items()}
    return {category: prompts for category, prompts in left.items() if prompts}, held_out


def table(score, error, means):
    """The score, its standard error and the tasks' means {task: mean}, beside the published figures, as lines of text."""
    rows = {"": "here", "overall": f"{score:.3f} ± {error:.3f}"} | {task: f"{mean:.3f}" for task, mean in means.items()}
    lines = [f"{name:14}{cell:>15}" for name, cell in rows.items()]
    for name, values in PUBLISHED.items():
        for i, cell in enumerate([name, *(f"{value:.2f}" for value in values)]):
            lines[i] += f"{cell:>{len(name) + 3}}"
    return "\n".join([*lines, NOTE])
