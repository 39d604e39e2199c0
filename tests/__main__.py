"""The whole suite, as two runs side by side: `python -m tests [what pytest takes]`.

What needs a broker spends much of its time waiting for processes to start, fail over and catch up. All else uses that
time, at a lower priority, so that it disturbs nobody; its words come when both have ended.
"""

import os
import subprocess
import sys
import tempfile

NICENESS = 5
NOTHING_COLLECTED = 5  # pytest's exit code


def run(arguments: list[str]) -> int:
    """The exit code of the run that went worse; a half in which no test was chosen counts only when both were such."""
    pytest = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryFile() as words:
        rest = subprocess.Popen(
            [*pytest, "-m", "not kafka", "-p", "no:cacheprovider"],
            stdout=words,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.nice(NICENESS),
        )
        try:
            codes = [subprocess.call([*pytest, "-m", "kafka"])]
            print("waiting for the tests without a broker …", flush=True)
            codes.append(rest.wait())
        finally:
            rest.kill()
        words.seek(0)
        sys.stdout.buffer.write(words.read())
    chosen = [code for code in codes if code != NOTHING_COLLECTED]
    return max(chosen, default=NOTHING_COLLECTED)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
