"""python run_part.py <part> <pipe>: runs one part's tests on student.py in the current folder and reports each to the pipe.

The pipe gets one line of JSON at a time: the tests with their points, then what each of them says ("" where it holds), then
"end". A process that ends without that line was ended by the submission.
"""

import importlib
import json
import os
import sys
import traceback


def tests_of(part):
    """The tests of a part, in order."""
    module = importlib.import_module(f"part{part}")
    return [test for name, test in vars(module).items() if name.startswith("test_")]


def run_test(test, submission):
    """What is wrong, or "" if nothing is. SystemExit and the like count as wrong too."""
    try:
        test(submission)
        return ""
    except (AssertionError, NotImplementedError) as error:
        return str(error)
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith("student.py")]
        where = f" in line {lines[-1]}" if lines else ""
        return f"{type(error).__name__}{where}: {str(error).strip() or 'no message'}"[:500]


def main(part, pipe):
    report = lambda line: os.write(pipe, (json.dumps(line) + "\n").encode())
    tests = tests_of(part)
    report([[test.__doc__, test.points] for test in tests])
    try:
        submission, broken = importlib.import_module("student"), ""
    except BaseException as error:
        submission, broken = None, f"the file cannot be imported: {type(error).__name__}: {error}"[:500]
    for test in tests:
        report(broken or run_test(test, submission))
    report("end")
    os._exit(0)  # not sys.exit: nothing that the submission left behind runs any more


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
