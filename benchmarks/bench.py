"""One bench: artifacts one after another, every condition of them, rows that may be published.

What is compared runs interleaved: the engines of a network and its peers. Rows are appended after
each run, so that a bench which is interrupted loses only the run it was in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from litezoo.export.artifact import default_folder, read_artifact
from litezoo.models.errors import MissingError, UsageError

from .achieved import with_shares
from .measure import Candidate, Measurement, candidates_of, check_conditions, measure
from .peers import PEERS, peer_candidates, pytorch_candidates
from .publish import mark_refused
from .results import append_rows, conditions, latest, read_rows
from .rows import results_folder

__all__ = [
    "REFERENCE_SET",
    "Agreement",
    "Bench",
    "Repeated",
    "bench",
    "compare_rows",
    "export_reference_set",
    "find_knees",
    "repeat",
]

#: The networks that results of devices are compared on.
REFERENCE_SET = (
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "shufflenetv2_x1_0",
    "repvgg_a0",
    "repvgg_a2",
    "cspresnext50",
    "cspdarknet53",
    "ese_vovnet19b_dw",
    "ese_vovnet39b",
    "ghostnet_100",
    "resnet18",
    "resnet50",
)
#: Batch sizes of a sweep, which ends where none gains `KNEE` any more, or a call takes too long.
SWEEP, KNEE, MOST_CALL_MS = (1, 2, 4, 8, 16, 32, 64, 128, 256), 0.05, 2000.0
#: Runs of a network in which rows are refused: it is measured again.
TRIES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the ratios of two benches agree; `differ` says of each that does not what."""

    compared: int
    differ: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The rows of one bench, the files they were appended to, and how they agree with before."""

    rows: tuple[Measurement, ...]
    files: tuple[Path, ...]
    agreement: Agreement

    @property
    def published(self) -> list[Measurement]:
        """Return the rows that are not refused."""
        return [row for row in self.rows if not row.refused]


def bench(
    folders: Sequence[Path],
    *,
    batches: Sequence[int] | None = (1, 32),
    threads: Sequence[int],
    streams: Sequence[int] = (1,),
    peers: Sequence[str] = (),
    pytorch: bool = False,
    end_to_end: bool = False,
    together: bool = False,
    keep_disturbed: bool = False,
    results: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Bench:
    """Measure artifacts and append the rows that may be published to `results`.

    Args:
        folders: artifacts; their networks are measured one after another.
        batches: batch sizes; None doubles them until throughput gains no more.
        threads: numbers of CPU threads, each measured for itself.
        streams: numbers of callers at once, which share the threads, within the same rounds.
        peers: ways of `PEERS` to run the other library's network in the same rounds.
        pytorch: our own network in PyTorch too.
        end_to_end: each artifact's first engine with its preprocessing too.
        together: all artifacts in the same rounds, to compare their times with each other.
        keep_disturbed: append refused rows too, which say so and are published nowhere.
        results: the folder of rows, default benchmarks/results.
        progress: is told each step.
    """
    check_conditions(batches=batches or SWEEP, threads=threads, streams=streams)
    folder = results or results_folder()
    groups = [list(folders)] if together else [[one] for one in folders]
    rows: list[Measurement] = []
    files: dict[Path, None] = {}
    before = _rows_before(folder, {read_artifact(one).device for one in folders})
    own = folder / "ceilings"
    ceilings = own if own.is_dir() else results_folder() / "ceilings"
    for group in groups:
        for count in threads:
            progress(f"loading engines of {', '.join(map(str, group))}")
            candidates = [
                candidate
                for one in group
                for candidate in _load(one, count, streams, peers, pytorch, end_to_end)
            ]
            for found in _measured(candidates, batches, count, ceilings, progress):
                rows += found
                kept = [row for row in found if keep_disturbed or not row.refused]
                files |= dict.fromkeys(append_rows(kept, folder))
    return Bench(
        rows=tuple(rows),
        files=tuple(files),
        agreement=compare_rows(rows, before),
    )


def _rows_before(folder: Path, devices: set[str]) -> list[Measurement]:
    files = [folder / f"{device}.jsonl" for device in sorted(devices)]
    return read_rows([file for file in files if file.is_file()])


def _load(
    folder: Path,
    threads: int,
    streams: Sequence[int],
    peers: Sequence[str],
    pytorch: bool,
    end_to_end: bool,
) -> list[Candidate]:
    return [
        *(peer_candidates(folder, peers, threads=threads) if peers else ()),
        *(pytorch_candidates(folder, threads=threads) if pytorch else ()),
        *candidates_of(folder, threads=threads, streams=streams, end_to_end=end_to_end),
    ]


def _measured(
    candidates: Sequence[Candidate],
    batches: Sequence[int] | None,
    threads: int,
    ceilings: Path,
    progress: Callable[[str], None],
) -> Iterator[list[Measurement]]:
    """Yield the rows of one batch size after another."""
    most: list[float] = []
    for batch in batches or SWEEP:
        found = _least_refused(candidates, batch, threads, progress)
        yield [
            with_shares(row, candidate, ceilings=ceilings, progress=progress)
            for row, candidate in zip(found, candidates, strict=True)
        ]
        speeds = [row.images_per_s for row in found]
        gains = [now > (1 + KNEE) * then for now, then in zip(speeds, most, strict=False)]
        slow = max(row.p50_ms for row in found) > MOST_CALL_MS / 2  # the next takes twice as long
        if batches is None and most and (slow or not any(gains)):
            return
        most = [max(pair) for pair in zip(speeds, most, strict=True)] if most else speeds


def _least_refused(
    candidates: Sequence[Candidate], batch: int, threads: int, progress: Callable[[str], None]
) -> list[Measurement]:
    """Measure until no row is refused, at most `TRIES` times; the run with the fewest counts."""
    best: list[Measurement] = []
    for number in range(TRIES):
        if number:
            progress(f"batch {batch}: again, as {_refused(best)} of {len(best)} rows were refused")
        found = mark_refused(measure(candidates, batch=batch, threads=threads, progress=progress))
        if not best or _refused(found) < _refused(best):
            best = found
        if not _refused(best):
            break
    return best


def _refused(rows: Sequence[Measurement]) -> int:
    return sum(bool(row.refused) for row in rows)


def find_knees(rows: Sequence[Measurement]) -> dict[str, tuple[Measurement, Measurement]]:
    """Return by label the least batch within `KNEE` of the most images/s, and the row of the most.

    Only of what was measured at more than two batch sizes.
    """
    groups: dict[str, list[Measurement]] = {}
    for row in rows:
        groups.setdefault(f"{row.model} {row.label}, {row.threads} threads", []).append(row)
    knees = {}
    for label, own in groups.items():
        if len({row.batch for row in own}) > 2:
            most = max(own, key=lambda row: row.images_per_s)
            near = [row for row in own if row.images_per_s >= (1 - KNEE) * most.images_per_s]
            knees[label] = (min(near, key=lambda row: row.batch), most)
    return knees


def compare_rows(new: Sequence[Measurement], old: Sequence[Measurement]) -> Agreement:
    """Compare ratios with the latest earlier rows of the same conditions and machine.

    They agree where the new ratio lies in the interval that the old row gives. Refused rows are not
    counted, nor those that others' ratios are over, which are 1.
    """
    before = {conditions(row): row for row in latest(old)}
    pairs = [
        (row, before[conditions(row)])
        for row in new
        if not row.refused
        and conditions(row) in before
        and row.ratio_to != f"{row.model} {row.label}"
    ]
    known = [
        (now, then, then.ratio_low, then.ratio_high)
        for now, then in pairs
        if then.ratio_low is not None and then.ratio_high is not None
    ]
    return Agreement(
        compared=len(known),
        differ=tuple(
            f"{now.model} {now.label}, batch {now.batch}, {now.threads} threads: {now.ratio:.2f}x, "
            f"was {then.ratio:.2f}x ({low:.2f} to {high:.2f})"
            for now, then, low, high in known
            if not low <= now.ratio <= high
        ),
    )


# ----------------------------------------------------------------------------- reference set


def export_reference_set(
    device: str,
    *,
    export: Callable[[str, Path], object],
    progress: Callable[[str], None] = lambda step: None,
) -> list[Path]:
    """Return the artifacts of the reference set for a device, after `export` made what is missing.

    `export` takes a name and the folder to make.
    """
    folders = [default_folder(model, device) for model in REFERENCE_SET]
    missing = [
        (model, folder)
        for model, folder in zip(REFERENCE_SET, folders, strict=True)
        if not folder.is_dir()
    ]
    for number, (model, folder) in enumerate(missing, 1):
        progress(f"exporting {model}, {number} of {len(missing)} that are missing")
        export(model, folder)
    return folders


# ------------------------------------------------------------------------------- repeating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeated:
    """A row that was measured again: its time over the old one, and whether the ratio agrees."""

    old: Measurement
    new: Measurement
    time_ratio: float
    same_machine: bool
    agrees: bool | None


def repeat(
    name: str,
    *,
    folder: Path | None = None,
    results: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Repeated:
    """Measure a row again, in one interleaved run with what its ratio is over.

    `name` is a row's `id` or the begin of it, `folder` its artifact (default:
    artifacts/<model>/<device>). `agrees` is None for rows without an interval and for those whose
    ratio is over themselves.
    """
    old = _find(name, results or results_folder())
    place = folder or default_folder(old.model, old.device)
    if not place.is_dir():
        random = " --weights random --calibration random --yes-really"
        raise MissingError(
            f"the row is of {old.model} for {old.device}, and {place} is not there; make it: "
            f"litezoo export {old.model} --device {old.device}"
            + (random if old.weights == "random" else "")
        )
    progress(f"loading engines of {place}")
    labels = dict.fromkeys([old.ratio_to, f"{old.model} {old.label}"])
    ways = {label.split()[1] for label in labels}
    peers = [way for way in PEERS if any(one.endswith(f"-{way}") for one in ways - _OURS)]
    candidates = {
        candidate.label: candidate
        for candidate in _load(
            place,
            old.threads,
            (1,) if old.streams == 1 else (1, old.streams),
            peers,
            any(way.startswith("pytorch-") for way in ways),
            old.scope == "end-to-end",
        )
    }
    if absent := [label for label in labels if label not in candidates]:
        raise MissingError(
            f"{place} has no {absent[0]} (it has {', '.join(candidates)}); export it as the row's "
            f"was: {old.weights} weights, {old.precision}"
        )
    chosen = [candidates[label] for label in labels]
    new = measure(chosen, batch=old.batch, threads=old.threads, progress=progress)[-1]
    same = new.machine.cpu == old.machine.cpu and new.machine.cores == old.machine.cores
    low, high = old.ratio_low, old.ratio_high
    is_own = len(chosen) == 1 or low is None or high is None
    return Repeated(
        old=old,
        new=new,
        time_ratio=round((new.best_ms or new.p50_ms) / (old.best_ms or old.p50_ms), 3),
        same_machine=same,
        agrees=None if is_own or low is None or high is None else low <= new.ratio <= high,
    )


_OURS = {"pytorch-eager", "pytorch-eager-channels-last"}


def _find(name: str, folder: Path) -> Measurement:
    """Return the row whose id begins with `name`."""
    rows = {row.id: row for row in read_rows(sorted(folder.glob("*.jsonl")))}
    found = [row for key, row in rows.items() if name and key.startswith(name)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} rows" if found else "no row"
    raise UsageError(
        f"{folder} has {what} whose id begins with {name!r}; the report and `litezoo bench --json` "
        "show ids (ten hex digits)"
    )
