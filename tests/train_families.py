"""Train the first model of every family on the embedded digits and write docs/digits.md.

A network that cannot learn digits is wired wrongly. `make digits` runs it; rows that stand in the
table are kept, so that it can be stopped and go on: delete a row to have it trained again.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from litezoo.models.catalogue import get_spec, list_models, resolve_name

TABLE = Path(__file__).parents[1] / "docs" / "digits.md"
HEAD = """# Every family learns the digits

The first model of every family, trained from scratch with recipes/train/digits.yaml on the embedded
digits (1149 training images, shown at 32 x 32), best checkpoint by validation, top-1 on the 360 test
images. Each run on one thread, two runs side by side on 2 cores: `make digits`.

| family | model | params M | epochs | test top-1 % | minutes |
|---|---|---:|---:|---:|---:|
"""


def rows():
    """Return the table's rows by family."""
    if not TABLE.is_file():
        return {}
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if "`make train-" in line}


def train(family):
    model = resolve_name(family)
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-m", "litezoo", "train", model, "--data", "digits", "--json"],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    if result.returncode:
        print(result.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"{model} was not trained (status {result.returncode})")
    run = json.loads(result.stdout)
    return (
        f"| {family} | [{model}](../models/{family}.py) (`make train-{family}`) "
        f"| {get_spec(model).params_train / 1e6:.1f} | {run['epochs']} "
        f"| {run['test_top1_percent']:.2f} | {run['seconds'] / 60:.1f} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    jobs = parser.parse_args().jobs
    families = sorted({get_spec(name).family for name in list_models()})
    done = {family: row for family, row in rows().items() if family in families}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(train, f): f for f in families if f not in done}
        for future in concurrent.futures.as_completed(waiting):
            done[waiting[future]] = future.result()
            print(done[waiting[future]], flush=True)
            table = "\n".join(done[family] for family in sorted(done))
            TABLE.write_text(f"{HEAD}{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
