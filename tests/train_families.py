"""Train one model of every family on the embedded digits and write docs/digits.md.

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

from litezoo.models.catalogue import get_spec, list_models

TABLE = Path(__file__).parents[1] / "docs" / "digits.md"
#: What the digits' recipe does not fit: a model, and options. MobileOne's deep sums start slowly;
#: RepOpt-VGG's smallest has 52 million parameters, and VGG 134: there fewer steps do.
MODELS = {"mobileone": "mobileone_s1"}
OPTIONS = {
    "mobileone": ["--model.optimizer.lr", "8.0e-3"],
    "repoptvgg": [
        *("--model.optimizer.lr", "1.0e-3", "--data.input_size", "16"),
        *("--trainer.max_epochs", "8", "--model.schedule.warmup_epochs", "1"),
    ],
    "vgg": [
        *("--model.optimizer.lr", "5.0e-4", "--data.batch_size", "64", "--model.ema_decay", "null"),
        *("--trainer.max_epochs", "6", "--model.schedule.warmup_epochs", "1"),
    ],
}
HEAD = """# What the families reach on the digits

The first network of every family, or its smallest where that is above a GMAC, trained from scratch
with recipes/train/digits.yaml on the embedded digits (1149 training images, shown at 32 x 32); best
checkpoint by validation, top-1 on the 360 test images. `make digits` writes this table. CPU minutes
are of one thread, so that a busy machine changes nothing; on two cores the wall clock shows less.

| family | command | params M | epochs | test top-1 % | CPU minutes |
|---|---|---:|---:|---:|---:|
"""


def rows():
    """Return the table's rows by family."""
    if not TABLE.is_file():
        return {}
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if "`make train-" in line}


def representative(family):
    """Return the family's first network, or where that is above a GMAC at 224 its smallest."""
    if family in MODELS:
        return get_spec(MODELS[family])
    specs = [get_spec(name) for name in list_models(family=family)]
    macs_m = [spec.macs_m * (224 / spec.resolution) ** 2 for spec in specs]
    return specs[0] if macs_m[0] <= 1000 else specs[macs_m.index(min(macs_m))]


def train(family):
    spec, words = representative(family), ["--data", "digits", *OPTIONS.get(family, ())]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.json"
        with output.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "litezoo", "train", spec.name, *words, "--json"],
                cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=stream,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"litezoo train {spec.name} ended with status {status}")
        run = json.loads(output.read_text())
    shown = " ".join(words[2:])
    command = f"make train-{spec.name}" + (f' ARGS="{shown}"' if shown else "")
    return (
        f"| {family} | `{command}` | {spec.params_train / 1e6:.1f} | {run['epochs']} "
        f"| {run['test_top1_percent']:.2f} | {(used.ru_utime + used.ru_stime) / 60:.1f} |"
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
