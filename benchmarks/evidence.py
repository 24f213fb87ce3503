"""Evidence: what is known of a network's speed, measured by litezoo or published by others.

Every row names its conditions; rows of different conditions are never joined. Published rows are
curated by hand (benchmarks/published/README.md); measured ones are what `litezoo bench` wrote. No
torch, numpy or pydantic is imported, so that looking evidence up is instant.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.errors import CheckFailed, UsageError

__all__ = [
    "PRECISIONS",
    "Evidence",
    "Kind",
    "SourceText",
    "Top1",
    "best_top1",
    "read_measured",
    "read_published",
    "sources",
]

Kind = Literal["measured", "published"]
_PUBLISHED = Path(__file__).parent / "published"
_RESULTS = Path("benchmarks/results")
_PACKAGED_RESULTS = Path(__file__).parent / "results"
#: What published rows compute in: the amp- ones under PyTorch's autocast, w8a16 with activations
#: of 16 bits.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "amp-fp16", "amp-bf16", "int8", "w8a16")
_COLUMNS = (
    "device", "runtime", "version", "precision", "layout", "threads", "source", "model", "form",
    "batch", "side", "ms", "images_per_s", "note",
)  # fmt: skip
_SOURCE_COLUMNS = ("id", "repository", "path", "licence", "measured")
_LAYOUTS = ("", "nchw", "nhwc")
_FORMS = ("train", "deploy")
_SLUG = re.compile(r"[a-z0-9]+(?:[-.][a-z0-9]+)*")
_RELATIVE = re.compile(r"(?:timm|torchvision):[a-z0-9]+(?:_[a-z0-9]+)*")
#: By how much images a second may differ from what batch and ms give: both are published.
_CONSISTENT = 1.25
#: Which of a result row's versions is its runtime's.
_PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "pytorch": "torch",
        "pytorch-eager": "torch",
        "onnxruntime_cuda": "onnxruntime",
        "onnxruntime_tensorrt": "onnxruntime",
        "rknn": "rknn-toolkit2",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One time of one network under named conditions.

    `model` is a name of the catalogue, or "timm:<name>" or "torchvision:<name>" for a near
    relative; `device` one of recipes/devices. `graph_form` "train" is the network as it is created,
    BatchNorm and branches apart, "deploy" the fused one; published rows of runtimes that fold
    BatchNorm themselves count as "deploy" unless the network kept its branches. `resolution` is the
    side of the square image; `threads` 0 means that they are not stated (or a GPU's). `ms` is of
    one call with the batch: the median where litezoo measured, what `source` says where others did.
    """

    model: str
    device: str
    runtime: str
    runtime_version: str
    precision: str
    layout: str
    graph_form: str
    batch: int
    resolution: int
    threads: int
    ms: float
    images_per_s: float
    kind: Kind
    source: str
    note: str = ""
    p90_ms: float | None = None
    p99_ms: float | None = None
    where: str = ""
    date: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceText:
    """Where published rows are from: repository@commit, the path in it, its licence, and how what
    was measured was measured.
    """

    id: str
    repository: str
    path: str
    licence: str
    measured: str


@dataclass(frozen=True, kw_only=True)
class Top1:
    """The ImageNet top-1 of one public checkpoint; it holds for images of side `resolution`."""

    percent: float
    weights: str
    licence: str
    source: str
    resolution: int


def read_published(
    device: str | None = None, *, folder: Path | None = None
) -> tuple[Evidence, ...]:
    """Read the published rows, of all devices or of one (which is faster).

    `folder` holds latency.csv and sources.csv (default: litezoo's own, which are read once). A
    damaged line is a CheckFailed with file, line and what is allowed.
    """
    return _read_own(device) if folder is None else _read_folder(device, folder)


@cache
def _read_own(device: str | None) -> tuple[Evidence, ...]:
    return _read_folder(device, _PUBLISHED)


def _read_folder(device: str | None, folder: Path) -> tuple[Evidence, ...]:
    file = folder / "latency.csv"
    check = _Check(sources(folder))
    rows: list[Evidence] = []
    first: dict[tuple[str, ...], int] = {}
    for number, cells in _lines(file, _COLUMNS):
        if device is not None and cells[0] != device:
            continue
        try:
            rows.append(check.read(cells))
        except ValueError as error:
            raise CheckFailed(f"{file}:{number}: {error}") from error
        conditions = tuple(cells[:11])
        if conditions in first:
            raise CheckFailed(
                f"{file}:{number}: the conditions of line {first[conditions]} again, from one "
                "source; keep one row"
            )
        first[conditions] = number
    return tuple(rows)


def sources(folder: Path = _PUBLISHED) -> Mapping[str, SourceText]:
    """Read the sources of the published rows by their id; a damaged line is a CheckFailed."""
    file = folder / "sources.csv"
    found: dict[str, SourceText] = {}
    for number, cells in _lines(file, _SOURCE_COLUMNS):
        source = SourceText(**dict(zip(_SOURCE_COLUMNS, cells, strict=True)))
        if not _SLUG.fullmatch(source.id):
            raise CheckFailed(
                f"{file}:{number}: id {source.id!r} is not a slug (a-z, 0-9, - and .)"
            )
        if source.id in found:
            raise CheckFailed(f"{file}:{number}: the source {source.id} is given twice")
        for column, cell in zip(_SOURCE_COLUMNS, cells, strict=True):
            if not cell.strip():
                raise CheckFailed(f"{file}:{number}: {column} of the source {source.id} is empty")
        found[source.id] = source
    return MappingProxyType(found)


def _lines(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield a CSV file's lines with their numbers, each checked for its cells."""
    if not file.is_file():
        raise UsageError(f"no {file}; it comes with litezoo: install it again")
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        if tuple(header) != columns:
            raise CheckFailed(f"{file}:1: the columns are {','.join(columns)}, not those there")
        for cells in reader:
            if len(cells) != len(columns):
                raise CheckFailed(
                    f"{file}:{reader.line_num}: {len(cells)} cells, not the {len(columns)} of the "
                    "header"
                )
            yield reader.line_num, cells


class _Check:
    """Reads lines of latency.csv; a text that was found good once is not looked at again."""

    def __init__(self, known: Mapping[str, SourceText]) -> None:
        self._known = known
        self._catalogue = frozenset(list_models())
        self._good: set[tuple[str, ...]] = set()

    def read(self, cells: list[str]) -> Evidence:
        """Return one line's evidence; ValueError with the reason for one that cannot be."""
        (
            device, runtime, version, precision, layout, threads, source, model, form, batch, side,
            ms, images_per_s, note,
        ) = cells  # fmt: skip
        texts = (device, runtime, precision, layout, source, form)
        if texts not in self._good:
            _slug("device", device)
            _slug("runtime", runtime)
            _one_of("precision", precision, PRECISIONS)
            _one_of("layout", layout, _LAYOUTS)
            _one_of("form", form, _FORMS)
            if source not in self._known:
                raise ValueError(f"source {source!r} is not in sources.csv")
            self._good.add(texts)
        if (model,) not in self._good:
            if model not in self._catalogue and not _RELATIVE.fullmatch(model):
                raise ValueError(
                    f"model {model!r} is neither in the catalogue nor timm:<name> or "
                    "torchvision:<name>"
                )
            self._good.add((model,))
        size = _whole("batch", batch)
        time = _number("ms", ms)
        derived = 1000 * size / time
        speed = _number("images_per_s", images_per_s) if images_per_s else derived
        if not 1 / _CONSISTENT < speed / derived < _CONSISTENT:
            raise ValueError(
                f"images_per_s {images_per_s} is not that of {ms} ms for a batch of {batch} "
                f"({derived:.5g}); leave it empty where it was measured apart"
            )
        return Evidence(
            model=model,
            device=device,
            runtime=runtime,
            runtime_version=version,
            precision=precision,
            layout=layout,
            graph_form=form,
            batch=size,
            resolution=_whole("side", side),
            threads=_whole("threads", threads) if threads else 0,
            ms=time,
            images_per_s=speed,
            kind="published",
            source=source,
            note=note,
        )


def _slug(column: str, text: str) -> None:
    if not _SLUG.fullmatch(text):
        raise ValueError(f"{column} {text!r} is not a slug (a-z, 0-9, - and .)")


def _one_of(column: str, text: str, allowed: tuple[str, ...]) -> None:
    if text not in allowed:
        names = ", ".join(name or "(empty)" for name in allowed)
        raise ValueError(f"{column} has {text!r}, allowed are {names}")


def _whole(column: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"{column} is {text!r}; it is a whole number above 0")
    return int(text)


def _number(column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{column} is {text!r}; it is a number above 0, without a unit")
    return number


def read_measured(folder: Path | None = None) -> tuple[Evidence, ...]:
    """Read litezoo's own rows: the newest of each set of conditions, refused ones left out.

    `folder` holds <device>.jsonl files as `litezoo bench` writes them; by default that is
    ./benchmarks/results where it has any, else the results that come with litezoo. Taken are
    litezoo's engines and PyTorch run eagerly, one caller at a time and without image decoding;
    `ms` is the median. A damaged line is a CheckFailed with file and line number.
    """
    files = sorted((folder or _RESULTS).glob("*.jsonl"))
    if not files and folder is None:
        files = sorted(_PACKAGED_RESULTS.glob("*.jsonl"))
    newest: dict[tuple[object, ...], tuple[str, Evidence | None]] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if row.get("refused"):
                    continue
                key, date = _conditions(row), str(row["date"])
                found = _measured(row, source=file.name)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise CheckFailed(
                    f"{file}:{number} is not a result row ({type(error).__name__}: {error}); "
                    "measure again: litezoo bench"
                ) from error
            if key not in newest or date >= newest[key][0]:
                newest[key] = date, found
    return tuple(found for _, found in newest.values() if found is not None)


def _conditions(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what has to be the same for two rows to be of the same question.

    As in results.py, but for the row that the ratio is over: a time is a time.
    """
    machine = row["machine"]
    return (
        row["device"], machine["cpu"], machine["versions"].get("gpu"), row["model"],
        tuple(row["resolution"]), row["runtime"], row["precision"], row["graph_form"],
        row["batch"], row["threads"], row.get("streams", 1), row.get("scope", "engine"),
        row["weights"], row["protocol"],
    )  # fmt: skip


def _measured(row: Mapping[str, Any], *, source: str) -> Evidence | None:
    """Return a result row's evidence, None for a row of another kind."""
    peer, _, peer_runtime = str(row["runtime"]).partition("-")
    is_peer = peer in ("timm", "torchvision", "peer")
    _, height, width = row["resolution"]
    if (
        (is_peer and peer_runtime != "eager")
        or row.get("streams", 1) != 1
        or row.get("scope", "engine") != "engine"
        or height != width
    ):
        return None
    runtime = "pytorch-eager" if is_peer else str(row["runtime"])
    versions = row["machine"]["versions"]
    return Evidence(
        model=str(row["model"]),
        device=str(row["device"]),
        runtime=runtime,
        runtime_version=str(versions.get(_PACKAGES.get(runtime, runtime), "")),
        precision=str(row["precision"]),
        layout="nchw" if is_peer else "",
        graph_form=str(row["graph_form"]),
        batch=int(row["batch"]),
        resolution=int(height),
        threads=int(row["threads"]),
        ms=float(row["p50_ms"]),
        images_per_s=float(row["images_per_s"]),
        kind="measured",
        source=source,
        note=f"protocol {row['protocol']}",
        p90_ms=float(row["p90_ms"]),
        p99_ms=float(row["p99_ms"]),
        where=str(versions.get("gpu") or "{cpu}, {cores} cores".format(**row["machine"])),
        date=str(row["date"])[:10],
    )


def best_top1(model: str, *, license: str | None = "free") -> Top1 | None:
    """Return the best top-1 among a model's public checkpoints that can be loaded, or None.

    `license` "free" asks for one that allows any use, another text for a licence by name, None for
    any. Checkpoints of other classes than ImageNet-1k's, or without a published top-1, do not
    count; neither do networks outside the catalogue.

    >>> best_top1("repvgg_a0").weights
    'rvgg_in1k'
    >>> best_top1("timm:resnext50_32x4d") is None
    True
    """
    if ":" in model:
        return None
    found = [
        Top1(
            percent=weights.top1_percent,
            weights=weights.tag,
            licence=weights.licence,
            source=weights.top1_source,
            resolution=weights.preprocess.input_size[-1],
        )
        for weights in get_spec(model).weights
        if weights.top1_percent is not None
        and not weights.unreadable
        and weights.num_classes == 1000
        and (license in (None, weights.licence) or (license == "free" and weights.is_free))
    ]
    return max(found, key=lambda top1: top1.percent, default=None)
