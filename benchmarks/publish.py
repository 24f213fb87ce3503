"""Whether a row is fit to be published: complete conditions, a quiet machine, a narrow interval.

`bench` appends only such rows, and `bench --check` looks at the rows of files again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from litezoo.models.errors import CheckFailed

from .measure import Measurement
from .results import read_rows

__all__ = ["check_files", "mark_refused", "refusal"]

#: Most that the quartiles of the block medians may be apart, over their median.
MOST_SPREAD = 0.3
#: Most that the end of a ratio's interval may be over its begin.
MOST_INTERVAL = 2.0
#: Packages whose version a row of a runtime needs; of others, that of the runtime's own name.
_PACKAGES = {"pytorch": "torch", "rknn": "rknn-toolkit2"}


def refusal(row: Measurement) -> str | None:
    """Return in one sentence why a row is not to be published, else None.

    Rows of schema 1, and those that kits measured, have no conditions to judge.
    """
    missing = [
        name
        for name, value in (("the CPU", row.machine.cpu), ("the system", row.machine.system))
        if value in ("", "unknown")
    ]
    package = _package(row.runtime)
    if package not in row.machine.versions:
        missing.append(f"the version of {package}")
    if missing:
        return f"its conditions are incomplete: {', '.join(missing)} unknown"
    if row.conditions is not None and (reason := row.conditions.refusal()) is not None:
        return reason
    if row.spread > MOST_SPREAD:
        return (
            f"its blocks differ by {row.spread:.0%} (at most {MOST_SPREAD:.0%}); measure again "
            "when the machine is quiet"
        )
    if row.ratio_low and row.ratio_high and row.ratio_high > MOST_INTERVAL * row.ratio_low:
        return (
            f"its ratio lies between {row.ratio_low} and {row.ratio_high}, which says too little; "
            "measure again when the machine is quiet"
        )
    return None


def _package(runtime: str) -> str:
    """Return the package of a runtime, or of a peer's way (timm-eager, pytorch-eager)."""
    library, _, way = runtime.replace("_", "-").partition("-")
    if way in ("onnxruntime", "openvino"):
        return way  # a peer's
    return _PACKAGES.get(library, library)


def mark_refused(rows: Sequence[Measurement]) -> list[Measurement]:
    """Return the rows of one run with `refused` filled in.

    A row whose ratio is over one that is refused is refused as well.
    """
    marked = [dataclasses.replace(row, refused=refusal(row) or "") for row in rows]
    bad = {(row.model, row.label, row.batch, row.threads): row for row in marked if row.refused}

    def base(row: Measurement) -> Measurement | None:
        label = row.ratio_to.removeprefix(f"{row.model} ")
        return bad.get((row.model, label, row.batch, row.threads))

    return [
        dataclasses.replace(
            row, refused=f"its ratio is over {row.ratio_to}, which is refused: {first.refused}"
        )
        if not row.refused and (first := base(row)) is not None
        else row
        for row in marked
    ]


def check_files(files: Iterable[Path]) -> int:
    """Read result files again and judge every row; return how many rows there are.

    Of guidelines, GPU truth, ceilings and profiles, told by their folder, that they can be read.
    CheckFailed with file and line for the first that is wrong.
    """
    from .ceilings import read_ceilings
    from .gpu_demo import read_truth
    from .guidelines import read_guidelines
    from .report_profiles import read_profile

    count = 0
    for file in files:
        if file.suffix == ".json" and file.parent.name == "ceilings":
            read_ceilings(file.stem, folder=file.parent)
            count += 1
        elif file.parent.name == "profiles":
            read_profile(file)
            count += 1
        elif file.parent.name == "guidelines":
            count += len(read_guidelines([file]))
        elif file.parent.name == "gpu":
            count += len(read_truth(file))
        else:
            rows = read_rows([file])
            for number, row in enumerate(rows, 1):
                if reason := row.refused or refusal(row) or _impossible(row, rows):
                    raise CheckFailed(f"{file}:{number} is not to be published: {reason}")
            count += len(rows)
    return count


def _impossible(row: Measurement, rows: Sequence[Measurement]) -> str | None:
    """Return what no measurement gives, else None."""
    if not 0 < row.p50_ms <= row.p90_ms <= row.p99_ms:
        return f"its percentiles are {row.p50_ms}, {row.p90_ms} and {row.p99_ms} ms"
    if min(row.batch, row.threads, row.streams, row.runs) < 1:
        return "its batch, threads, streams or runs are less than 1"
    speed = 1e3 * row.streams * row.batch / row.p50_ms
    if abs(row.images_per_s - speed) > 0.06 + 1e-3 * speed:
        return f"{row.p50_ms} ms are {speed:.1f} images/s, not {row.images_per_s}"
    if row.ratio_low is not None and row.ratio_high is not None:
        if not row.ratio_low <= row.ratio <= row.ratio_high:
            return f"its ratio {row.ratio} is outside {row.ratio_low} to {row.ratio_high}"
        names = {f"{one.model} {one.label}" for one in rows if one.date == row.date}
        if row.ratio_to not in names:
            return f"the row that its ratio is over, {row.ratio_to}, is not there"
    return None
