"""Grades submissions: every part's tests in a process of their own, in a temporary copy, with a time limit for each test.

    python assignments/grade.py                                  # your assignments/student.py
    python assignments/grade.py --only 3                         # one part
    python assignments/grade.py --train                          # with the training bars of parts 2 to 5 and 7, minutes each
    python assignments/grade.py --solution                       # the scripts' own functions
    python assignments/grade.py submissions/ --csv grades.csv    # a folder of submissions, one file each

Prints points and what is wrong, and writes grade.json to the current folder.
"""

import argparse
import csv
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = dict(enumerate("likelihood,group advantages,ratio and clip,chunks,gains,measuring credit,a fooled judge".split(","), 1))
BAR_POINTS = 5
GRACE = 5  # seconds beyond its limit that a test has to be interrupted in, before its process is ended
START = 180  # seconds for Python, torch and, with --solution, the scripts to be imported
OUTPUT = 1  # megabytes that a part may print
TRAIN_OUTPUT = 64  # and a training run may print or save in one file


def fail(message):
    """Bad input: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def refuse_module_names(paths):
    """Ends the program if a submission has the name of a module: Python would import it wherever that module is wanted."""
    for path in paths:
        ours = {file.stem for file in [*ROOT.glob("*.py"), *HERE.rglob("*.py")] if file != path.resolve()} - {"student"}
        ours |= {package.parent.name for package in ROOT.glob("*/__init__.py")}
        for owner, names in (("Python", sys.stdlib_module_names), ("this project", ours)):
            if path.stem in names:
                fail(f"{path.name} has the name of a module of {owner}, which it would replace: rename the file")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", nargs="?", type=Path, default=HERE / "student.py", help="a file, or a folder of them")
    parser.add_argument("--only", type=int, choices=PARTS, action="append", help="grade this part alone; may be repeated")
    parser.add_argument("--solution", action="store_true", help="grade the reference solution")
    parser.add_argument("--train", action="store_true", help="train for the bars of parts 2 to 5 and 7 too")
    parser.add_argument("--limit", type=float, default=30, help="seconds a test may take")
    parser.add_argument("--csv", type=Path, help="table of the grades, a line for each submission")
    args = parser.parse_args()
    if args.solution:
        args.submission = HERE / "reference.py"
    if not args.submission.exists():
        fail(f"there is no {args.submission}")
    if args.submission.is_dir() and not list(args.submission.glob("*.py")):
        fail(f"{args.submission} holds no .py file to grade")
    refuse_module_names(submissions_of(args))
    if args.limit <= 0:
        fail(f"--limit {args.limit:g} must be a positive number of seconds")
    return args


def submissions_of(args):
    """The files to grade."""
    return sorted(args.submission.glob("*.py")) if args.submission.is_dir() else [args.submission.resolve()]


def copy_project(folder):
    """What a training run needs, without the course."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("judges/*.txt"), *ROOT.glob("judges/*.json")]:
        if path.parent.name not in ("tests", "assignments"):
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    shutil.copytree(ROOT / "miniature", folder / "miniature", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def watch(command, folder, pipe, limit, environment=()):
    """Runs a command in a folder; yields the lines it writes to `pipe` = (read, write), at last how it ended, "" if as it should.

    A line must come every `limit` seconds (the first: START). Whatever the command has started ends with it.
    """
    read, write = pipe
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PWD", "OLDPWD")} | dict(
        environment
    )
    with (folder / "output.txt").open("wb") as output:
        streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        process = subprocess.Popen(command, cwd=folder, env=environment, pass_fds=[write], start_new_session=True, **streams)
    os.close(write)
    ended, pending, patience = "", b"", max(START, limit)
    try:
        while True:
            if not select.select([read], [], [], patience)[0]:
                ended = f"it took longer than {patience:g} seconds: is there an endless loop?"
                break
            chunk = os.read(read, 2**16)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                patience = limit
                yield line.decode()
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
    finally:
        os.close(read)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not ended and process.returncode < 0:
        ended = f"the process crashed ({signal.Signals(-process.returncode).name})"
    elif not ended and process.returncode:
        ended = f"the process was ended with exit code {process.returncode}"
    yield ended


def grade_part(part, submission, limit):
    """Points and messages of one part's tests. Where its process is ended, the results until then count."""
    with tempfile.TemporaryDirectory(prefix="grade-") as folder:
        folder = Path(folder)
        patience = limit + GRACE
        if submission == HERE / "reference.py":  # other submissions find no script to import
            copy_project(folder)
            patience = max(START, patience)
        for path in [*HERE.glob("tests/*.py"), HERE / "bugs.py"]:
            shutil.copy(path, folder)
        shutil.copy(submission, folder / "student.py")
        pipe = os.pipe()
        command = [sys.executable, "-B", "guard.py", str(OUTPUT), "run_part.py"]
        command += [str(part), str(pipe[1]), str(limit), submission.name]
        *lines, ended = watch(command, folder, pipe, patience, {"OMP_NUM_THREADS": "1"})
        printed = (folder / "output.txt").read_bytes()
    if not lines:
        raise SystemExit(f"the tests of part {part} could not be started: {ended}\n{printed.decode(errors='replace')[-2000:]}")
    tests, *messages = map(json.loads, lines)
    if messages[-1:] != ["end"]:
        running = tests[min(len(lines) - 1, len(tests) - 1)][0]
        flood = f"more than {OUTPUT} MB was printed or written; " if len(printed) >= OUTPUT * 2**20 else ""
        ended = f"no points from here on: {flood}{ended or 'the process was ended (sys.exit or os._exit?)'} This was at: {running}"
        messages += [ended] * (len(tests) - len(messages))
    elif len(printed) >= OUTPUT * 2**20:
        messages = [f"no points for part {part}: more than {OUTPUT} MB was printed or written"] * len(tests)
    return [dict(test=test, of=of, points=0 if message else of, message=message) for (test, of), message in zip(tests, messages)]


def grade_bar(part, submission, bar):
    """The training bar of one part, a held-out score: points if the submission's functions or flags reach it."""
    if bar is None:
        return dict(test="Training bar", of=0, points=0, message="the bar of this part has not been measured yet")
    title = f"Training bar: held-out score of {bar:.3f} or more"
    with tempfile.TemporaryDirectory(prefix="grade-") as folder:
        folder = Path(folder)
        copy_project(folder)
        shutil.copytree(HERE, folder / "assignments", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(submission, folder / "submission.py")
        pipe = os.pipe()
        command = [sys.executable, "-B", "assignments/tests/guard.py", str(TRAIN_OUTPUT), "assignments/train.py", str(part)]
        command += ["--functions", "submission.py", "--output-dir", "run"]
        *_, ended = watch(command, folder, pipe, 900)
        try:
            score = json.loads((folder / "run" / "result.json").read_text())["final_score"]
        except (OSError, ValueError, KeyError):
            *_, last = ["", *(folder / "output.txt").read_bytes()[-4000:].decode(errors="replace").strip().splitlines()]
            return dict(test=title, of=BAR_POINTS, points=0, message=f"the training run did not finish; {ended or last}")
    message = "" if score >= bar else f"the held-out score is {score:.3f}"
    return dict(test=title, of=BAR_POINTS, points=0 if message else BAR_POINTS, message=message)


def grade(submission, parts, limit, train):
    """Grades one file, prints what is wrong, and returns its line of grade.json."""
    print(f"\n{submission.name}")
    result = dict(submission=submission.name, points=0, of=0, parts={})
    bars = json.loads((HERE / "bars.json").read_text()) if train else {}
    for part in parts:
        tests = grade_part(part, submission, limit)
        if str(part) in bars:
            tests.append(grade_bar(part, submission, bars[str(part)]["bar"]))
        points, of = sum(test["points"] for test in tests), sum(test["of"] for test in tests)
        result["parts"][part] = dict(points=points, of=of, tests=tests)
        result["points"], result["of"] = result["points"] + points, result["of"] + of
        print(f"{part} {PARTS[part]:18} {points:3} of {of}", flush=True)
        said = set()
        for test in tests:
            if test["message"]:
                print(f"    {test['points']}/{test['of']} {test['test']}")
                print(f"        {test['message']}\n" * (test["message"] not in said), end="", flush=True)
                said.add(test["message"])
    print(f"{'total':20} {result['points']:3} of {result['of']}")
    return result


def write(path, text):
    """Replaces a file whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main():
    args = parse_args()
    for target in (Path("grade.json"), *([args.csv] if args.csv else ())):
        if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
            fail(f"{target} cannot be written")
    parts, results = sorted(set(args.only or PARTS)), []
    for submission in submissions_of(args):
        results.append(grade(submission, parts, args.limit, args.train))
        write(Path("grade.json"), json.dumps(results, indent=2) + "\n")
        if args.csv:
            rows = [[r["submission"], *(r["parts"][p]["points"] for p in parts), r["points"], r["of"]] for r in results]
            with tempfile.SpooledTemporaryFile(mode="w+", newline="") as table:
                csv.writer(table).writerows([["submission", *(f"part {p}" for p in parts), "points", "of"], *rows])
                table.seek(0)
                write(args.csv, table.read())


if __name__ == "__main__":
    main()
