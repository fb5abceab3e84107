"""Three silent bugs: each changes one line of grpo.py, which still runs, but learns worse or nothing.

    python assignments/bugs.py 1 --iterations 10       # flags are grpo.py's; a run without the bug is: python grpo.py ...

The changed script is written to runs/bugs/bug_1.py: look at its TensorBoard page, then read that file. This file is the key: a
student who reads on ends the exercise.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Bug(NamedTuple):
    """A line of grpo.py, what takes its place (nothing: the line goes), and its symptom among those of 3_clip.md."""

    line: str
    replacement: str
    symptom: str


BUGS = {
    1: Bug(
        "ratio = torch.exp(log_prob_new - log_prob_old[b, k])",
        "ratio = torch.exp(log_prob_new - log_prob_old[b, k - 1])",
        "c",
    ),
    2: Bug(
        "return (centred / (std + 1e-4) * has_spread).clamp(-5, 5).flatten()",
        "return (centred / (std + 1e-4) * has_spread).clamp(-5, 5).T.flatten()",
        "a",
    ),
    3: Bug("optimizer.zero_grad(set_to_none=True)", "", "d"),
}


def apply(bug, source):
    """The source with the bug in it; ValueError if its line is not there exactly once."""
    found = [line for line in source.splitlines(keepends=True) if line.strip() == bug.line]
    if len(found) != 1:
        raise ValueError(
            f"grpo.py has the line {bug.line!r} {len(found)} times, not once: choose another line in assignments/bugs.py"
        )
    return source.replace(found[0], found[0].replace(bug.line, bug.replacement) if bug.replacement else "")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in map(str, BUGS):
        print(f"error: say which bug: {', '.join(map(str, BUGS))}; then grpo.py's flags", file=sys.stderr)
        sys.exit(2)
    script = ROOT / f"runs/bugs/bug_{sys.argv[1]}.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(apply(BUGS[int(sys.argv[1])], (ROOT / "grpo.py").read_text()))
    sys.exit(subprocess.run([sys.executable, script, *sys.argv[2:]], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode)
