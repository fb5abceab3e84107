"""Measures the training bars: the base score plus half the mean gain of the reference over the seeds; writes bars.json.

    python assignments/bars.py          # parts 2 to 5 and 7, five runs each, minutes a run
    python assignments/bars.py 4        # one part; another process may measure another at the same time

A part's script, flags and seeds are set in bars.json by hand; measure it again after changing them or the script.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from grade import fail, write
from train import FUNCTIONS, reward_curve

HERE = Path(__file__).resolve().parent


def measure(part, bar):
    """The entry of bars.json with what its runs gave."""
    results, curves = [], []
    for seed in bar["seeds"]:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [sys.executable, HERE / "train.py", part, "--solution", "--seed", str(seed), "--output-dir", run]
            subprocess.run(command, check=True)
            results.append(json.loads((run / "result.json").read_text()))
            curves.append(reward_curve(run))
    base = float(np.mean([result["base_score"] for result in results]))
    gain = float(np.mean([result["final_score"] for result in results])) - base
    curve = [round(reward, 4) for reward in np.mean(curves, 0).tolist()]
    return bar | dict(base=round(base, 4), mean_gain=round(gain, 4), bar=round(base + gain / 2, 4), curve=curve)


def main():
    parts = sys.argv[1:] or [str(part) for part in FUNCTIONS]
    for part in parts:
        if part not in map(str, FUNCTIONS):
            fail(f"part {part} has no training bar; parts with one are {', '.join(map(str, FUNCTIONS))}")
    read = lambda: json.loads((HERE / "bars.json").read_text())
    for part in parts:
        bar = measure(part, read()[part])
        write(HERE / "bars.json", json.dumps(read() | {part: bar}, indent=2) + "\n")  # read again: others write their parts
        print(f"part {part}: base {bar['base']}, mean gain {bar['mean_gain']}, bar {bar['bar']}")


if __name__ == "__main__":
    main()
