"""Export every network of the zoo at fp32, fp16 and int8, check its parity, write docs/export.md.

`make test-export-all` runs it. Rows that stand in the table are kept while the versions in its head
are those installed here, so that it can be stopped and go on: delete a row to have it done again.
It ends with status 3 where a network is not what PyTorch says, with the reason under the table.
"""

import argparse
import concurrent.futures
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

TABLE = Path(__file__).parents[1] / "docs" / "export.md"
RUNTIMES = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "fp16", "int8")
CELLS = tuple(f"{runtime} {precision}" for runtime in RUNTIMES for precision in PRECISIONS)
PACKAGES = ("litezoo", "torch", "onnx", "onnxscript", "onnxsim", *RUNTIMES)
#: Pixels of a side, images that are compared, images that int8 is calibrated on.
SIDE, IMAGES, CALIBRATION = 64, 7, 32
HEAD = """# What exports

Every network with random weights, its BatchNorms with the statistics of noise, exported at
{side} x {side} pixels and run at batch 1, 2 and 7 by both CPU runtimes. fp32 and fp16: largest
difference of a logit from PyTorch's (float32), over the largest logit; int8: power of the logits
over that of the difference in dB, calibrated on noise. It says that files and runtimes are right,
nothing of accuracy. `make test-export-all` writes this table.

{versions}

| network | {cells} | CPU seconds |
|---|{rulers}---:|
"""


def head():
    cells = " | ".join(CELLS)
    return HEAD.format(
        side=SIDE, versions=versions(), cells=cells, rulers="---:|" * len(CELLS)
    )  # fmt: skip


def versions():
    return "Versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + "."


def read_table():
    """Return what stands in the table by network: cells as text, reasons behind "!", seconds."""
    text = TABLE.read_text(encoding="utf-8") if TABLE.is_file() else ""
    if versions() not in text.splitlines():
        return {}
    reasons = dict(re.findall(r"^\[\^(\d+)\]: (.*)$", text, re.MULTILINE))
    found = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if len(parts) == len(CELLS) + 2 and parts[0].strip("`") != parts[0]:
            cells = [re.sub(r"^failed\[\^(\d+)\]$", lambda m: f"!{reasons[m[1]]}", cell)
                     for cell in parts[1:-1]]  # fmt: skip
            found[parts[0].strip("`")] = (*cells, parts[-1])
    return found


def write_table(done):
    """Write the rows in order; the same reason has one footnote."""
    from litezoo.models.files import write_whole

    numbers = {}
    lines = []
    for name in sorted(done):
        *cells, seconds = done[name]
        shown = [
            f"failed[^{numbers.setdefault(cell[1:], len(numbers) + 1)}]" if cell[0] == "!" else cell
            for cell in cells
        ]
        lines.append(f"| `{name}` | {' | '.join(shown)} | {seconds} |")
    notes = [f"[^{number}]: {reason}" for reason, number in numbers.items()]
    text = head() + "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")
    write_whole(TABLE, text)


def export_one(name, wanted=CELLS, *, network=None, images_for_int8=CALIBRATION):
    """Return the `wanted` cells of one network's row; a failure is a cell "!reason".

    It is the network of that name with random weights unless another is given.
    """
    import numpy as np
    import torch

    from litezoo.export.compare import compare_logits
    from litezoo.export.parity import TOLERANCE, check_batches, check_parity
    from litezoo.export.runtime import BuildSource, get_runtime
    from litezoo.export.source import load_source
    from litezoo.export.to_onnx import export_onnx, simplify_onnx
    from litezoo.models.fuse import fuse, graph_form
    from litezoo.recipes.devices import get_device

    torch.set_num_threads(1)
    start = time.process_time()
    rng = np.random.default_rng(0)
    cells = {}
    try:
        train_form = (network or load_source(name, "random", ()).model).eval()
        deploy = fuse(train_form).eval() if graph_form(train_form) == "train" else train_form
        shape = (train_form.in_chans, SIDE, SIDE)
        images, calibration = (
            rng.standard_normal((count, *shape)).astype(np.float32)
            for count in (IMAGES, images_for_int8)
        )
        with torch.inference_mode():
            logits = [net(torch.from_numpy(images)).numpy() for net in (train_form, deploy)]
        expected = logits[1]
        check_parity(
            "fuse", expected, logits[0], reference="the train form", tolerance=TOLERANCE["fp32"]
        )
        del train_form, network
        fp32, _ = simplify_onnx(export_onnx(deploy, images[:2], metadata={}), images)
    except Exception as error:
        cells = dict.fromkeys(wanted, f"!{_reason(error)}")
        return (*cells.values(), f"{time.process_time() - start:.0f}")
    device = get_device("cpu")
    with tempfile.TemporaryDirectory(prefix="litezoo-export-all-") as scratch:
        folder, files, failed = Path(scratch), {}, {}
        for precision in PRECISIONS:
            for runtime in map(get_runtime, RUNTIMES):
                label = f"{runtime.name} {precision}"
                if label not in wanted:
                    continue
                form = runtime.precisions[precision]
                try:
                    if form not in files and form not in failed:
                        try:
                            proto = typed(fp32, form, images, calibration)
                            files[form] = folder / f"{form}.onnx"
                            files[form].write_bytes(proto.SerializeToString())
                            del proto
                        except Exception as error:
                            failed[form] = error
                    if form in failed:
                        raise failed[form]
                    built = runtime.build(
                        BuildSource(onnx=files, module=deploy, images=images),
                        device=device, precision=precision, folder=folder,
                    )  # fmt: skip
                    session = runtime.load(built, device=device, precision=precision, threads=1)
                    parity = check_batches(
                        label, session.run, images, expected, tolerance=TOLERANCE[precision]
                    )
                    cells[label] = f"{parity.max_relative_error:.1e}"
                    if precision == "int8":
                        cells[label] = f"{compare_logits(session.run(images), expected).snr_db:.1f}"
                    del session
                except Exception as error:
                    cells[label] = f"!{_reason(error)}"
    return (*(cells[label] for label in wanted), f"{time.process_time() - start:.0f}")


def typed(fp32, form, images, calibration):
    """Return the float32 model in a form, as export makes it."""
    from litezoo.export.qdq_lint import check_lint
    from litezoo.export.to_half import check_fp16_range, to_half
    from litezoo.export.to_int8 import quantize

    if form == "fp32":
        return fp32
    if form == "fp16":
        check_fp16_range(fp32, images)
        return to_half(fp32, "fp16")
    proto = quantize(fp32, calibration, form=form)
    if form == "int8":
        check_lint(proto)
    return proto


def _reason(error):
    """Return an error in one line that a table can hold, without the scratch folder's name."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return re.sub(r"\S*litezoo-export-all-[^/]*/", "", line).replace("|", "/")


def run_one(name):
    """Return a network's row from a process of its own: a crash is a failure of that row alone."""
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=errors, check=False,
        )  # fmt: skip
        if done.returncode:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["it said nothing"]
            reason = (
                f"!the process ended with status {done.returncode}: {last[0].replace('|', '/')}"
            )
            return (*[reason] * len(CELLS), "0")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--models", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the table is")
    parser.add_argument("--one", help="print the row of this network as JSON and write no table")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(export_one(options.one)))
        return
    globals()["TABLE"] = options.table

    from litezoo.models.catalogue import list_models

    names, patterns = list_models(), options.models
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            parser.error(f"no network is named {pattern}; see: litezoo list")
    chosen = [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]
    done = {name: row for name, row in read_table().items() if name in names}
    waiting = [name for name in chosen if name not in done]
    print(f"{len(chosen) - len(waiting)} of {len(chosen)} stand in {TABLE}", flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
    try:
        jobs = {pool.submit(run_one, name): name for name in waiting}
        for count, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            name = jobs[job]
            done[name] = job.result()
            write_table(done)
            print(f"[{count}/{len(waiting)}] {name}: {', '.join(done[name])}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C: those that run are waited for, no others
    failed = [name for name in chosen if any(cell[0] == "!" for cell in done[name])]
    if failed:
        print(f"{len(failed)} of {len(chosen)} networks failed: {', '.join(failed)}")
        sys.exit(3)


if __name__ == "__main__":
    main()
