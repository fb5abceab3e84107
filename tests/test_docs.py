"""The pages of docs/ against the code: logged metrics, functions, flags, commands, links and pictures."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import ROOT, SCRIPTS, run
from torch.distributed.run import get_args_parser

import arguments
import evaluate
import gcpo
import grpo
import stepwise_grpo
from experiments import compare, curves

ARGS = {"grpo": grpo.Args, "gcpo": gcpo.Args, "stepwise_grpo": stepwise_grpo.Args, "evaluate": evaluate.Args}
PAGES = {script: (ROOT / "docs" / f"{script}.md").read_text() for script in SCRIPTS}
COMMAND = r"(?m)(?:^    |`)((?:python|torchrun|tensorboard) [^`\n#]*)"
# With another reward than the verifier, whose metrics are all of the verifier's and one more; enough images for a variety
FLAGS = "--iterations 1 --beta 0.1 --reward jpeg-compressibility --eval-images 144 --eval-steps 4"
RESULTS = [ROOT / "experiments/results" / name for name in ("README.md", "earlier.md")]
EVERYWHERE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "miniature/README.md"]
each_script = pytest.mark.parametrize("script", SCRIPTS)


def table(page, title):
    """Rows, lists of cells, of the first table under a headline."""
    lines = page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [line.strip("|").split(" | ") for line in lines if line.startswith("|")][2:]


def pattern(name):
    """losses/ratio_<update> as a regular expression."""
    return re.sub("<[a-z]+>", r"\\d+", name)


def commands(page):
    """The words of every command on a page, of lines and of inline code."""
    return [shlex.split(part) for command in re.findall(COMMAND, page) for part in command.split("&&")]


@each_script
def test_every_logged_metric_is_explained_and_no_other(script, tmp_path):
    folder = run(script, tmp_path / "run", *FLAGS.split())
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    logged = {*tags["scalars"], *tags["histograms"], *tags["images"], *(tag.split("/")[0] for tag in tags["tensors"])}
    rows = [row[0] for page in {"grpo", script} for row in table(PAGES[page], "Logged metrics")]
    explained = [pattern(name) for row in rows for name in re.findall("`(.+?)`", row)]
    assert len(explained) == len(set(explained)) and len(logged) > 15
    unexplained = {tag for tag in logged if not any(re.fullmatch(name, tag) for name in explained)}
    assert not unexplained
    named = {row.strip(" `") for row in (cells[0] for cells in table(PAGES[script], "Logged metrics"))}
    named |= set(re.findall(r"`((?:charts|losses|chunks|gain|time)/[\w<>]+)`", PAGES[script]))
    unlogged = {name for name in named if not any(re.fullmatch(pattern(name), tag) for tag in logged)}
    assert not unlogged
    curves.draw(folder, tmp_path / "curves.png")


@each_script
def test_every_equation_names_functions_that_exist(script):
    for row in table(PAGES[script], "The objective"):
        assert re.search(r"\[`\w+`\]\(\.\./", row[-1]), row
    for name, file in re.findall(r"\[`(\w+)`\]\(\.\./(\S+\.py)\)", PAGES[script]):
        assert name in {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}, (name, file)


@each_script
def test_every_command_and_flag_is_understood(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no --output-dir exists
    found = commands(PAGES[script])
    assert {words[0] for words in found} >= {"python", "torchrun"} and any("--resume" in words for words in found)
    for words in found:
        program, *rest = words
        if program == "torchrun":
            parsed = get_args_parser().parse_args(rest)
            rest = [parsed.training_script, *parsed.training_script_args]
        if program == "tensorboard" or rest[1:] == ["--help"]:
            continue
        if rest[:2] == ["-m", "experiments.compare"]:
            tyro.cli(compare.Args, args=rest[2:])
        elif rest[:2] == ["-m", "experiments.curves"]:
            assert len(rest) == 4 and (ROOT / rest[3]).is_file()
        elif "--resume" in rest or rest[0] == "evaluate.py":  # of runs that are not there
            tyro.cli(ARGS[Path(rest[0]).stem], args=rest[1:])
        else:
            arguments.parse_args(ARGS[Path(rest[0]).stem], None, rest[1:])
    known = {f"--{field.replace('_', '-')}" for field in ARGS[script].__dataclass_fields__}
    known |= {flag.replace("--", "--no-") for flag in known}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(COMMAND, "", PAGES[script]))) - known <= (
        {"--global-std"} if script == "stepwise_grpo" else set()  # which it is said to lack
    )


@each_script
def test_every_link_leads_somewhere_and_pictures_are_small(script):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[script]) if "://" not in link]
    assert f"{script}.png" in links and f"../{script}.py" in links
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / "docs" / path
        assert target.exists(), link
        if anchor:
            titles = re.findall("^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link
        assert target.suffix != ".png" or target.stat().st_size <= 300_000, link


def test_the_readme_is_short_complete_and_says_first_what_matters():
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"\S*\w\S*", text)) <= 1100
    assert not re.findall(r"@[A-Z_0-9]+@", text)  # places that wait for a figure
    first_screen = text.split("![")[0].lower()
    assert all(word in first_screen for word in ("status", "course", "variety", "not yet on real weights"))
    order = ["## Quick start", "## Learn, research, teach", "## The three algorithms", "## What was found", "## Real models"]
    assert sorted(order, key=text.index) == order


@pytest.mark.parametrize("page", [*EVERYWHERE, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_every_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            assert not path or (page.parent / path).exists(), link
        if anchor and "://" not in link:
            target = (page.parent / path if path else page).read_text()
            titles = re.findall("^#+ (.+)$", target, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


# Figures that stand in more than one place: a pattern whose groups must be the same wherever it is found
FIGURES = {
    "parameters of the miniature": r"\b([\d.]+) M parameters",
    "parameters of the models": r"(2\.2 and 2\.0 B)",
    "captions' base score": r"(?:base model (?:has|had)|from) (0\.4\d+)\b",
    "score of the first command": r"iteration \d+: held-out score ([\d.]+)|all: score +[\d.]+ -> +([\d.]+)",
    "variety of the first command": r"iteration \d+: held-out score [\d.]+, variety ([\d.]+)|all: variety +[\d.]+ -> +([\d.]+)",
    "base score, printed": r"base model: held-out score ([\d.]+)|all: score +([\d.]+) ->",
    "base variety, printed": r"base model: held-out score [\d.]+, variety ([\d.]+)|all: variety +([\d.]+) ->",
    "minutes of training": r"([\d.]+) min of training",
    "GenEval of the papers": r"(SD3\.5-M [\d.]+, Flow-GRPO [\d.]+)",
    "standard error of a score over its images": r"standard error over 864 images is ([\d.]+)",
    "noise of the last step": r"(\d+) %\s+of\s+the\s+noise\s+in\s+GRPO's\s+gradient",
}


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_the_same_wherever_it_stands(figure):
    found = {}
    for page in [*EVERYWHERE, *RESULTS, ROOT / "assignments/README.md"]:
        for groups in re.finditer(FIGURES[figure], page.read_text()):
            found.setdefault(next(value for value in groups.groups() if value), set()).add(page.name)
    assert len(found) <= 1, found
