"""The `litezoo` program: each verb parses its words, calls one function, and shows the result.

Exit status: 0 ok, 2 wrong usage, 3 a check failed, 4 something needed is not on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from litezoo.models.errors import LitezooError, MissingError, UsageError, unknown_name, wrong_words

if TYPE_CHECKING:
    from litezoo.benchmarks.backbones import Backbone
    from litezoo.benchmarks.fit import Fit
    from litezoo.benchmarks.measure import Measurement
    from litezoo.benchmarks.pick import Pick
    from litezoo.benchmarks.predict import Prediction
    from litezoo.benchmarks.profiling import Profile
    from litezoo.export.artifact import Accuracy, Engine, Rung
    from litezoo.export.parity import Parity

__all__ = ["main"]


def _show(values: Any, *, as_json: bool, text: Callable[[], None]) -> None:
    """Print `values` as JSON on standard output, or run `text`."""
    if as_json:
        print(json.dumps(values, indent=2, default=_plain))
    else:
        text()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns that hold only numbers are set to the right, long words wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for index, column in enumerate(columns):
        numeric = all(row[index].rstrip("x %").replace(".", "").isdigit() for row in rows)
        whole = numeric or index == 0
        table.add_column(column, justify="right" if rows and numeric else "left", no_wrap=whole)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Show the running step on standard error: a spinner on a terminal, else a line each."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda step: status.update(step)
        return
    shown: set[str] = set()

    def line(step: str) -> None:
        kind = step.split(": round")[0]
        if kind not in shown:
            shown.add(kind)
            print(f"- {kind}", file=sys.stderr, flush=True)

    yield line


# ---------------------------------------------------------------------------------------- verbs


def _list_parser(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'repvgg_b*'")
    parser.add_argument("--pretrained", action="store_true", help="only with public weights")
    parser.add_argument("--family", help="only of this family")
    parser.add_argument("--max-params-m", type=float, help="most million parameters, deploy form")
    parser.add_argument("--min-top1", type=float, help="least ImageNet top-1 %% of public weights")
    parser.add_argument("--license", help="of the weights: 'free' (any use) or a name")


def _list(args: Namespace) -> None:
    from litezoo.models.catalogue import get_spec, list_models

    names = list_models(
        args.pattern,
        pretrained=args.pretrained,
        family=args.family,
        max_params_m=args.max_params_m,
        min_top1=args.min_top1,
        license=args.license,
    )
    if not names:
        raise UsageError(
            f"no model matches {args.pattern!r} and the conditions (see: litezoo list)"
        )
    specs = [get_spec(name) for name in names]
    best = [spec.get_weights() if spec.is_pretrained else None for spec in specs]

    def text() -> None:
        _table(
            f"{len(specs)} models (parameters and MACs of the deploy form; weights: the default)",
            ("name", "params M", "MACs M", "input", "paper top-1 %", "weights", "top-1 %",
             "licence"),
            [
                (
                    spec.name,
                    f"{spec.params_deploy / 1e6:.2f}",
                    f"{spec.macs_m:.1f}",
                    str(spec.resolution),
                    _percent(spec.paper_top1_percent),
                    *(("-",) * 3 if w is None else (w.tag, _percent(w.top1_percent), w.licence)),
                )
                for spec, w in zip(specs, best, strict=True)
            ],
        )  # fmt: skip

    values = [
        {
            "name": spec.name,
            "family": spec.family,
            "params_deploy": spec.params_deploy,
            "macs_m": spec.macs_m,
            "resolution": spec.resolution,
            "paper_top1_percent": spec.paper_top1_percent,
            "weights": [w.tag for w in spec.weights if not w.unreadable],
            "top1_percent": w and w.top1_percent,
            "licence": w and w.licence,
        }
        for spec, w in zip(specs, best, strict=True)
    ]
    _show(values, as_json=args.json, text=text)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _info_parser(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a name of `litezoo list`")


def _info(args: Namespace) -> None:
    from litezoo.models.catalogue import get_spec, list_left_out

    spec = get_spec(args.model)
    left_out = list_left_out(spec.family)

    def text() -> None:
        def line(key: str, value: object) -> None:
            print(f"  {key:24} {value}")

        print(f"{spec.name}  (family {spec.family}, {spec.paper})")
        for key, value in spec.architecture.items():
            line(key, value)
        line("parameters, train form", f"{spec.params_train:,}")
        line("parameters, deploy form", f"{spec.params_deploy:,}")
        line("MACs, deploy form", f"{spec.macs_m:,.1f} M at {spec.resolution} px")
        claims = (
            ("M parameters", spec.paper_params_m),
            ("M MACs", spec.paper_macs_m),
            ("% top-1", spec.paper_top1_percent),
        )
        if spec.paper_source:
            said = ", ".join(f"{value} {unit}" for unit, value in claims if value is not None)
            line("paper", f"{said or 'no figures'}: {spec.paper_source}")
        line("differs from the paper", spec.differs or "no")
        for library, theirs in spec.references.items():
            line("the same network", f"{library}: {theirs}")
        for duty, reason in spec.exempt.items():
            line("exception", f"{duty}: {reason}")
        readable = [w for w in spec.weights if not w.unreadable]
        if readable:
            print()
            _table(
                "weights (the first is the default; a licence in brackets must be accepted)",
                ("tag", "top-1 %", "licence", "px", "crop", "resize", "mean", "std", "classes"),
                [
                    (
                        w.tag,
                        _percent(w.top1_percent),
                        w.licence if w.is_free else f"({w.licence})",
                        str(w.preprocess.input_size[1]),
                        f"{w.preprocess.crop_pct:g}",
                        w.preprocess.interpolation,
                        _numbers(w.preprocess.mean),
                        _numbers(w.preprocess.std),
                        str(w.num_classes or "none"),
                    )
                    for w in readable
                ],
            )
            for w in readable:
                says = f"  (top-1: {w.top1_source})" if w.top1_source else ""
                line(w.tag, f"{w.source}{says}")
        else:
            line("weights", "none that can be loaded")
        for w in spec.weights:
            if w.unreadable:
                line(w.tag, f"not loadable, {w.unreadable}: {w.source}")
        for name, reason in left_out.items():
            line(f"no {name}:", reason)

    values = {**_plain(spec), "left_out_of_the_family": left_out}
    _show(values, as_json=args.json, text=text)


def _numbers(values: Sequence[float]) -> str:
    """Return one number where all are the same (a mean of 0.5), else all of them."""
    return "/".join(f"{v:g}" for v in (values[:1] if len(set(values)) == 1 else values))


def _devices_parser(parser: ArgumentParser) -> None:
    parser.add_argument("device", nargs="?", help="one device in full (default: a table of all)")


def _devices(args: Namespace) -> None:
    from litezoo.recipes.devices import get_device, list_devices

    devices = [get_device(n) for n in ([args.device] if args.device else list_devices())]

    def text() -> None:
        if args.device:
            for key, value in _plain(devices[0]).items():
                if value not in (None, "", {}):
                    print(f"  {key:20} {dict(value) if isinstance(value, Mapping) else value}")
            return
        _table(
            f"{len(devices)} devices",
            ("name", "what", "runtimes", "precisions"),
            [
                (d.name, d.title, ", ".join(d.runtimes), ", ".join(d.precisions))
                for d in devices
            ],
        )  # fmt: skip

    _show(devices, as_json=args.json, text=text)


def _export_parser(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="default: that of the last trained checkpoint")
    parser.add_argument("--device", help="a name of `litezoo devices` (required)")
    parser.add_argument("--weights", help="tag, checkpoint file or 'random' (speed only)")
    parser.add_argument("--precision", default="auto", help="default: all of the device's that "
                        "pass, the fastest first")  # fmt: skip
    parser.add_argument("--calibration", help="images for int8: 'digits', a folder, or 'random' "
                        "(default: what the weights were trained on)")  # fmt: skip
    parser.add_argument("--yes-really", action="store_true",
                        help="calibrate on noise, for measuring speed only")  # fmt: skip
    parser.add_argument("--keep-float", nargs="+", default=[], metavar="NODE",
                        help="ONNX nodes that int8 leaves in float")  # fmt: skip
    parser.add_argument("--max-drop", type=float, default=0.5,
                        help="most points of top-1 that a precision may lose")  # fmt: skip
    parser.add_argument("--last-rung", metavar="RUNG", help="how far int8 climbs to lose no more: "
                        "minmax, equalize, ranges, float-layers, adaround, qat (default: "
                        "float-layers; qat where int8 is named with --precision)")  # fmt: skip
    parser.add_argument("--objective", choices=("latency", "throughput"), default="latency")
    parser.add_argument("--batch", type=int, default=1, help="batch size that engines are compared "
                        "at (default: 1)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--triton", action="store_true", help="lay a repository for Triton "
                        "Inference Server into the build kit")  # fmt: skip
    parser.add_argument("--embed-preprocess", action="store_true", help="also ONNX files that take "
                        "uint8 images (N, H, W, C) of the input's size")  # fmt: skip
    parser.add_argument("--dynamic-resolution", action="store_true", help="engines that take other "
                        "image sizes too: sides of multiples of 32, from 64 on")  # fmt: skip
    parser.add_argument("--io", choices=("fp32", "fp16", "bf16"), default="fp32", help="what ONNX "
                        "files of that precision take and give (default: fp32)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="only compare the network with the "
                        "device's limits")  # fmt: skip
    parser.add_argument("--force", action="store_true",
                        help="build again though nothing has changed")  # fmt: skip
    parser.add_argument("--engine", choices=("auto", "require"), default="auto",
                        help="require: no build kit instead of an engine")  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: artifacts/<model>/<device>")
    parser.add_argument("--allow-license", nargs="+", default=[],
                        help="accept these licences of weights")  # fmt: skip
    parser.add_argument("--accuracy-images", type=int, default=2000,
                        help="most test images to compare top-1 on")  # fmt: skip


def _sizes(parity: Parity) -> str:
    """Return e.g. "1, 2, 7 at 224x224 and 160x192"; without the images' sizes where it is one."""
    batches = ", ".join(map(str, parity.batches))
    sizes = " and ".join(f"{height}x{width}" for height, width in parity.resolutions)
    return f"{batches} at {sizes}" if sizes else batches


def _evidence(stage: str, parity: Parity, accuracy: Accuracy | None) -> tuple[str, ...]:
    """Return one line of export's table."""
    top1 = "-"
    if accuracy is not None:
        top1 = (
            f"{accuracy.top1_percent:.2f} (PyTorch {accuracy.pytorch_top1_percent:.2f}, "
            f"{accuracy.images} images)"
        )
    snr = "-" if accuracy is None else f"{accuracy.snr_db:.0f}"
    return stage, parity.reference, _sizes(parity), f"{parity.max_relative_error:.1e}", snr, top1


def _check_limits(args: Namespace, model: str, weights: str) -> None:
    from litezoo.export.exporter import check
    from litezoo.models.errors import CheckFailed

    with _steps() as progress:
        findings = check(
            model, device=args.device, weights=weights, precision=args.precision,
            dynamic_resolution=args.dynamic_resolution, allow_license=args.allow_license,
            progress=progress,
        )  # fmt: skip

    def text() -> None:
        if not findings:
            print(f"{args.device} has no limit that {model} meets")
            return
        _table(
            f"{model} on {args.device}: {len(findings)} findings",
            ("kind", "what", "layers", "what to do"),
            [
                (f.kind, f.message, f"{f.count}: {', '.join(f.layers)}", f.remedy)
                for f in findings
            ],
        )  # fmt: skip

    _show(findings, as_json=args.json, text=text)
    if wrong := [f for f in findings if f.kind == "forbidden" and not f.fixed]:
        raise CheckFailed(f"{model} does not run on {args.device}: {wrong[0]}")


def _export(args: Namespace) -> None:
    from litezoo.recipes.devices import get_device

    if args.device is None:
        raise UsageError("for which device? for example: litezoo export --device cpu "
                         "(see: litezoo devices)")  # fmt: skip
    get_device(args.device).select_precisions(args.precision)  # before anything slow
    from litezoo.export.artifact import default_folder
    from litezoo.export.exporter import export
    from litezoo.export.source import choose_source

    if args.calibration == "random" and not args.yes_really:
        raise UsageError("int8 calibrated on noise has no accuracy; if it is for measuring speed "
                         "only, add --yes-really")  # fmt: skip
    from litezoo.benchmarks.measure import rank

    model, weights = choose_source(args.model or None, args.weights or None)
    if args.check:
        _check_limits(args, model, weights)
        return
    out = args.out or default_folder(model, args.device)
    with _steps() as progress, _shown_rungs(args):
        artifact = export(
            model,
            device=args.device,
            weights=weights,
            out=out,
            precision=args.precision,
            engine=args.engine,
            calibration=args.calibration,
            keep_float=args.keep_float,
            max_drop=args.max_drop,
            last_rung=args.last_rung,
            accuracy_images=args.accuracy_images,
            objective=args.objective,
            batch=args.batch,
            threads=args.threads,
            triton=args.triton,
            embed=args.embed_preprocess,
            dynamic_resolution=args.dynamic_resolution,
            io=args.io,
            force=args.force,
            rank=functools.partial(rank, threads=args.threads, progress=progress),
            allow_license=args.allow_license,
            progress=progress,
        )

    def text() -> None:
        rows = [
            _evidence(check.stage, check, artifact.onnx_accuracy.get(check.stage[5:]))
            for check in artifact.checks
        ]
        rows = [(*row, "-") for row in rows] + [
            (*_evidence(e.label, e.parity, e.accuracy),
             "-" if e.ms_per_batch is None else _tuned(e))
            for e in artifact.engines
        ]  # fmt: skip
        _table(
            f"{model} ({weights}) for {args.device}, deploy form",
            ("stage", "compared with", "batch", "relative error", "SNR dB", "top-1 %",
             f"ms, batch {args.batch}"),
            rows,
        )  # fmt: skip
        if artifact.ladder:
            _ladder(artifact.ladder, args.max_drop)
        for what, reason in artifact.not_built.items():
            print(f"{what}: not built ({reason})")
        if artifact.kit:
            print(f"build kit: {out / 'kit'}  (copy it to the device, then see its README.md)")
        for note in artifact.notes:
            print(f"note: {note}")
        print(f"artifact: {out}")

    values = {"folder": str(out), **json.loads(artifact.to_json())}
    _show(values, as_json=args.json, text=text)


@contextmanager
def _shown_rungs(args: Namespace) -> Iterator[None]:
    """Print the rungs that int8 tried where none was good enough."""
    from litezoo.export.ladder import NotWorthIt

    try:
        yield
    except NotWorthIt as error:
        if not args.json:
            _ladder([own.rung for own in error.tried], args.max_drop)
        raise


def _ladder(rungs: Sequence[Rung], max_drop: float) -> None:
    """Print what each rung of the int8 ladder gave."""
    _table(
        f"int8: the rungs tried, until top-1 drops by {max_drop:g} points or less",
        ("form", "rung", "how", "top-1 %", "drop", "agreement %", "SNR dB", "MB", "ms", "verdict"),
        [
            (
                rung.form,
                rung.stage,
                rung.said,
                f"{rung.accuracy.top1_percent:.2f}",
                f"{rung.accuracy.drop:.2f}",
                f"{rung.accuracy.agreement_percent:.1f}",
                f"{rung.accuracy.snr_db:.0f}",
                f"{rung.size_bytes / 1e6:.2f}",
                "-" if rung.ms_per_batch is None else f"{rung.ms_per_batch:.3f}",
                "taken" if rung.refused is None else "refused",
            )
            for rung in rungs
        ],
    )


def _tuned(engine: Engine) -> str:
    """Return e.g. "1.234" or, where not all threads are the fastest, "1.234 (1 thread)"."""
    tuned = engine.tuned_label.removeprefix(f"{engine.label} ")
    return f"{engine.ms_per_batch:.3f}" + ("" if engine.threads is None else f" {tuned}")


def _quantize_parser(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="default: that of the last trained checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="say from the weights alone what "
                        "int8 would cost; writes nothing (required)")  # fmt: skip
    parser.add_argument("--weights", help="tag, checkpoint file or 'random'")
    parser.add_argument("--device", help="whose finest scales: per channel or per tensor "
                        "(default: both)")  # fmt: skip
    parser.add_argument("--layers", type=int, default=5, help="how many layers to show, the worst "
                        "first (default: 5)")  # fmt: skip
    parser.add_argument("--allow-license", nargs="+", default=[],
                        help="accept these licences of weights")  # fmt: skip


def _quantize(args: Namespace) -> None:
    if not args.dry_run:
        raise UsageError("`litezoo export --precision int8` makes 8-bit engines; add --dry-run to "
                         "see what they would cost, without data")  # fmt: skip
    from litezoo.export.int8_risk import dry_run
    from litezoo.export.source import choose_source

    model, weights = choose_source(args.model or None, args.weights or None)
    with _steps() as progress:
        found = dry_run(
            model, weights=weights, device=args.device, allow_license=args.allow_license,
            progress=progress,
        )  # fmt: skip

    def text() -> None:
        for sentence in found.said:
            print(sentence)
        for risk in found.risks:
            _table(
                f"{found.model} ({found.weights}), deploy form, {risk.granularity} weights",
                ("layer", "output SNR dB", "worst column dB", "input channel"),
                [
                    (layer.name, f"{layer.output_snr_db:.1f}", f"{layer.worst_column_sqnr_db:.1f}",
                     str(layer.worst_column))
                    for layer in risk.layers[: args.layers]
                ],
            )  # fmt: skip
            print(risk)

    values = {**_plain(found), "risks": [{**_plain(r), "verdict": r.verdict} for r in found.risks]}
    _show(values, as_json=args.json, text=text)


def _verify_parser(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="an artifact's folder")
    parser.add_argument("--deep", action="store_true", help="compare node by node and name the "
                        "first at which outputs part")  # fmt: skip


def _verify_deep(args: Namespace) -> None:
    from litezoo.export.deep import deep_verify
    from litezoo.models.errors import CheckFailed

    with _steps() as progress:
        progress(f"comparing the nodes of {args.folder}")
        report = deep_verify(args.folder)

    def text() -> None:
        for entry in report.compared:
            print(f"  {entry}")
        for label, reason in report.skipped.items():
            print(f"  {label}: not compared ({reason})")

    _show(report, as_json=args.json, text=text)
    if report.parting is not None:
        raise CheckFailed(f"{args.folder}: {report.parting}")


def _verify(args: Namespace) -> None:
    if args.deep:
        _verify_deep(args)
        return
    from litezoo.export.artifact import verify

    with _steps() as progress:
        progress(f"verifying {args.folder}")
        report = verify(args.folder)

    def text() -> None:
        print(f"{args.folder}: {report.files} files intact")
        for parity in report.parities:
            print(
                f"  {parity.stage}: relative error {parity.max_relative_error:.1e} at batch "
                f"{_sizes(parity)} (allowed {parity.tolerance:.0e})"
            )
        for label, reason in report.skipped.items():
            print(f"  {label}: not run here ({reason})")

    _show(report, as_json=args.json, text=text)


def _bench_parser(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=Path,
                        help="artifact folders (default: artifacts/<models>/<device>); with "
                        "--check result files")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="whose artifacts, where none is named")
    parser.add_argument("--models", nargs="+", help="of which models (default: all exported)")
    parser.add_argument("--reference-set", action="store_true", help="the 14 networks that devices "
                        "are compared on; exports those missing, with random weights")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="batch sizes "
                        "(default: 1 32)")  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="instead: batch 1, 2, 4, ... until "
                        "throughput gains no more")  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1],
                        help="CPU threads, one after another (default: all cores)")  # fmt: skip
    parser.add_argument("--streams", nargs="+", type=int, default=[1], help="callers at once, who "
                        "share the threads (default: 1)")  # fmt: skip
    parser.add_argument("--end-to-end", action="store_true", help="also each artifact's first "
                        "engine from decoded photos: resize, crop, normalise, run")  # fmt: skip
    parser.add_argument("--pytorch", action="store_true",
                        help="also PyTorch eager, in train form and fused")  # fmt: skip
    parser.add_argument("--peers", nargs="*", metavar="WAY",
                        help="also the same network of timm or torchvision: eager, compile, "
                        "onnxruntime, openvino (default: all of them)")  # fmt: skip
    parser.add_argument("--together", action="store_true", help="all artifacts in the same rounds, "
                        "not one network after another")  # fmt: skip
    parser.add_argument("--keep-disturbed", action="store_true", help="append rows that are not to "
                        "be published too; they say why")  # fmt: skip
    parser.add_argument("--results", type=Path, help="default: benchmarks/results")
    parser.add_argument("--check", action="store_true", help="instead: judge the rows of result "
                        "files again (default: all in --results)")  # fmt: skip
    parser.add_argument("--repro", metavar="ID", help="instead: measure a row of --results again; "
                        "FOLDERS may name its artifact")  # fmt: skip
    parser.add_argument("--gpu-truth", action="store_true",
                        help="instead: an NVIDIA GPU's GPU-Util next to what it hides")  # fmt: skip
    parser.add_argument("--gpu", type=int, default=0, help="which GPU, as PyTorch numbers them")
    parser.add_argument("--picture", type=Path, help="with --gpu-truth: an HTML file to draw it to")
    parser.add_argument("--import", type=Path, dest="result", metavar="FILE",
                        help="append what a build kit measured (its result.json) instead; FOLDERS "
                        "may name the artifact that the kit was made in")  # fmt: skip


def _import(args: Namespace) -> None:
    from litezoo.benchmarks.import_kit import import_result
    from litezoo.benchmarks.rows import results_folder

    if len(args.folders) > 1:
        raise UsageError("a kit's result is of one artifact; name one folder, or none")
    results = args.results or results_folder()
    rows = import_result(
        args.result, results=results, artifact=args.folders[0] if args.folders else None
    )

    def text() -> None:
        for row in rows:
            print(f"  {row.model} {row.label}, batch {row.batch}: {row.p50_ms:.3f} ms")
        print(f"appended {len(rows)} rows to {results / rows[0].device}.jsonl")

    _show(rows, as_json=args.json, text=text)


def _gpu_truth(args: Namespace) -> None:
    from litezoo.benchmarks.gpu_demo import (
        COLUMNS,
        append_truth,
        columns_of,
        measure_truth,
        write_picture,
    )
    from litezoo.benchmarks.rows import results_folder

    with _steps() as progress:
        rows = measure_truth(
            gpu=args.gpu, device=None if args.device == "cpu" else args.device, progress=progress
        )
        file = append_truth(rows, (args.results or results_folder()) / "gpu")
        if args.picture is not None:
            write_picture(rows, args.picture)

    def text() -> None:
        counters = rows[0].counters
        _table(
            f"{counters.gpu}, driver {counters.driver}: GPU-Util and what it hides",
            COLUMNS,
            [columns_of(row) for row in rows],
        )
        for row in rows:
            print(f"{row.case}: {row.what}")
            for sentence in row.sentences:
                print(f"  {sentence}")
        print(f"appended {len(rows)} rows to {file}")

    _show(rows, as_json=args.json, text=text)


def _check_results(args: Namespace) -> None:
    from litezoo.benchmarks.publish import check_files
    from litezoo.benchmarks.rows import results_folder

    place = args.results or results_folder()
    files = args.folders or sorted([*place.glob("*.jsonl"), *place.glob("*/*.json*")])
    if not files:
        raise MissingError(f"no results in {place} yet; measure first: litezoo bench DIR")
    count = check_files(files)
    text = f"{count} rows in {len(files)} files are fit to be published"
    values = {"files": list(map(str, files)), "rows": count}
    _show(values, as_json=args.json, text=lambda: print(text))


def _repro(args: Namespace) -> None:
    from litezoo.benchmarks.bench import repeat
    from litezoo.models.errors import CheckFailed

    if len(args.folders) > 1:
        raise UsageError("a row is of one artifact; name one folder, or none")
    with _steps() as progress:
        found = repeat(
            args.repro,
            folder=args.folders[0] if args.folders else None,
            results=args.results,
            progress=progress,
        )
    old, new = found.old, found.new

    def text() -> None:
        print(f"{old.model} {old.label}, batch {old.batch}, {old.threads} threads")
        print(f"  then  {old.date[:10]}, {old.machine.cpu}: {old.p50_ms:.3f} ms, {_ratio(old)}")
        print(f"  now   {new.date[:10]}, {new.machine.cpu}: {new.p50_ms:.3f} ms, {_ratio(new)}")
        print(f"  time now over then: {found.time_ratio:.3f}")
        if new.refused:
            print(f"  not to be published: {new.refused}")
        if found.agrees is not None:
            print(f"  the ratio {'agrees' if found.agrees else 'does not agree'} with the interval")

    _show(found, as_json=args.json, text=text)
    if found.agrees is False and found.same_machine:
        raise CheckFailed(
            f"the ratio of row {old.id} is {new.ratio:.2f}, outside {old.ratio_low:.2f} to "
            f"{old.ratio_high:.2f}; measure again when the machine is quiet"
        )


def _ratio(row: Measurement) -> str:
    """Return e.g. "3.20x (3.01 to 3.40) repvgg_a0 timm-eager fp32 train"."""
    low, high = row.ratio_low, row.ratio_high
    between = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{row.ratio:.2f}x{between} {row.ratio_to}"


def _reference_set(args: Namespace, progress: Callable[[str], None]) -> list[Path]:
    from litezoo.benchmarks.bench import export_reference_set
    from litezoo.benchmarks.measure import rank
    from litezoo.export.exporter import export

    def make(model: str, folder: Path) -> object:
        return export(
            model, device=args.device, weights="random", calibration="random", out=folder,
            rank=functools.partial(rank, progress=progress), progress=progress,
        )  # fmt: skip

    return export_reference_set(args.device, export=make, progress=progress)


#: Rows that are refused, of which the reason is shown.
_FEW = 4


def _bench(args: Namespace) -> None:
    instead = {
        "--check": (args.check, _check_results),
        "--repro": (args.repro is not None, _repro),
        "--import": (args.result is not None, _import),
        "--gpu-truth": (args.gpu_truth, _gpu_truth),
    }
    asked = [name for name, (is_asked, _) in instead.items() if is_asked]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} are different things; ask for one")
    if asked:
        instead[asked[0]][1](args)
        return
    from litezoo.benchmarks.bench import bench, find_knees
    from litezoo.benchmarks.measure import check_conditions
    from litezoo.benchmarks.peers import PEERS
    from litezoo.export.artifact import find_artifacts
    from litezoo.models.errors import CheckFailed

    check_conditions(batches=args.batch, threads=args.threads, streams=args.streams)
    with _steps() as progress:
        if args.reference_set:
            folders = _reference_set(args, progress)
        else:
            folders = args.folders or find_artifacts(args.device, args.models)
        found = bench(
            folders,
            batches=None if args.sweep else args.batch,
            threads=args.threads,
            streams=args.streams,
            peers=() if args.peers is None else args.peers or PEERS,
            pytorch=args.pytorch,
            end_to_end=args.end_to_end,
            together=args.together,
            keep_disturbed=args.keep_disturbed,
            results=args.results,
            progress=progress,
        )

    def text() -> None:
        _bench_table(found.rows)
        for label, (knee, most) in find_knees(found.rows).items():
            print(
                f"knee of {label}: batch {knee.batch}, {knee.images_per_s:.0f} img/s "
                f"(most: {most.images_per_s:.0f} at {most.batch})"
            )
        for row in (row for row in found.rows if row.steady is False):
            print(f"not steady after warming up: {row.model} {row.label}, batch {row.batch}")
        refused = [row for row in found.rows if row.refused]
        for row in refused[:_FEW]:
            print(f"not published: {row.model} {row.label}, batch {row.batch}: {row.refused}")
        if len(refused) > _FEW:
            print(f"not published: {len(refused) - _FEW} others (--json says why)")
        kept = len(found.rows) if args.keep_disturbed else len(found.published)
        print(f"appended {kept} rows to {', '.join(map(str, found.files)) or 'no file'}")
        if found.agreement.compared:
            same = found.agreement.compared - len(found.agreement.differ)
            print(f"as in the bench before: {same} of {found.agreement.compared} ratios")
        for difference in found.agreement.differ:
            print(f"  {difference}")
        if len(folders) == 1:
            _use_it(folders[0], found.rows)

    values = {**_plain(found), "ids": [row.id for row in found.rows]}
    _show(values, as_json=args.json, text=text)
    if not found.published and not args.keep_disturbed:
        raise CheckFailed(f"no row is to be published: {found.rows[0].refused}")


def _bench_table(rows: Sequence[Measurement]) -> None:
    first = rows[0]
    threads, models = {row.threads for row in rows}, {row.model for row in rows}
    overhead = "-" if first.harness_us is None else f"{first.harness_us:.2g} us"

    def engine(row: Measurement) -> str:
        name = row.label if len(models) == 1 else f"{row.model} {row.label}"
        return name if len(threads) == 1 else f"{name}, {row.threads} threads"

    _table(
        f"{', '.join(sorted(models)) if len(models) == 1 else f'{len(models)} networks'}; "
        f"{first.machine.cpu}, {', '.join(map(str, sorted(threads)))} threads; ratio: speed over "
        f"{first.ratio_to.removeprefix(f'{first.model} ')}, by the least block medians; interval: "
        f"where a second bench finds it; an empty session takes {overhead} a call",
        ("engine", "batch", "p50 ms", "p90 ms", "p99 ms", "img/s", "ratio", "interval", "of peak",
         "of memory", "top-1 %"),
        [
            (engine(r), str(r.batch), f"{r.p50_ms:.3f}", f"{r.p90_ms:.3f}", f"{r.p99_ms:.3f}",
             f"{r.images_per_s:.0f}", f"{r.ratio:.2f}x",
             "-" if r.ratio_low is None else f"{r.ratio_low:.2f}-{r.ratio_high:.2f}",
             _share(r.flops_percent), _share(r.bytes_percent),
             "-" if r.top1_percent is None else f"{r.top1_percent:.2f}")
            for r in rows
        ],
    )  # fmt: skip


def _share(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.0f} %"


def _use_it(folder: Path, rows: Sequence[Measurement]) -> None:
    """Print how the fastest engine of the first batch size is used."""
    from litezoo.export.runtime import list_runtimes

    built = list_runtimes()
    engines = [r for r in rows if r.batch == rows[0].batch and r.runtime in built]
    fastest = max(engines, key=lambda row: row.images_per_s)
    shape = ", ".join(map(str, fastest.resolution))
    print(
        f"artifact: {folder}\nuse it:\n"
        f"    import litezoo, numpy\n"
        f'    engine = litezoo.load("{folder}", runtime="{fastest.runtime}")\n'
        f"    print(engine(numpy.zeros((1, {shape}), numpy.float32)).argmax(1))"
    )


def _profile_parser(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a name of `litezoo list`, or an ONNX file")
    parser.add_argument("--device", help="whose ceilings give the times (a name of `litezoo "
                        "devices`)")  # fmt: skip
    parser.add_argument("--batch", type=int, help="images at once (default: 1, or what an ONNX "
                        "file fixes)")  # fmt: skip
    parser.add_argument("--resolution", type=int, help="height and width (default: the model's, or "
                        "what an ONNX file fixes)")  # fmt: skip
    parser.add_argument("--precision", help="default: the device's best, else fp32; of an ONNX "
                        "file its own")  # fmt: skip
    parser.add_argument("--train-form", action="store_true", help="before fusing, beside the "
                        "deploy form: what fusing saves")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw the roofline too")
    parser.add_argument("--save", action="store_true", help="keep it for `litezoo report`, in "
                        "benchmarks/results/profiles")  # fmt: skip
    parser.add_argument("--layers", type=int, default=10, help="rows of the most expensive layers "
                        "(default: 10)")  # fmt: skip


def _profile(args: Namespace) -> None:
    from litezoo.benchmarks.profiling import profile

    with _steps() as progress:
        result = profile(
            args.model, device=args.device, batch=args.batch, resolution=args.resolution,
            precision=args.precision, train_form=args.train_form, progress=progress,
        )  # fmt: skip
        if args.html is not None:
            from litezoo.benchmarks.draw_roofline import write_roofline

            progress(f"drawing {args.html}")
            write_roofline(result, args.html)
    saved = None
    if args.save:
        from litezoo.benchmarks.report_profiles import save_profile

        saved = save_profile(result.deploy or result)

    def text() -> None:
        _profile_text(result, args.layers)
        if args.html is not None:
            print(f"roofline: {args.html}")
        if saved is not None:
            print(f"kept for the report: {saved}")

    _show(result.to_dict(), as_json=args.json, text=text)


def _profile_text(result: Profile, count: int) -> None:
    from litezoo.benchmarks.graph import KINDS

    forms = [result] if result.deploy is None else [result, result.deploy]

    def cells(value: Callable[[Profile], str]) -> tuple[str, ...]:
        return tuple(value(form) for form in forms)

    def share(form: Profile, kind: str) -> str:
        own = form.share(kind)
        parts = (("MACs", "macs"), ("bytes unfused", "unfused_bytes"), ("bytes", "fused_bytes"),
                 ("time", "ms"))  # fmt: skip
        return ", ".join(
            f"{100 * number:.1f} % of {words}"
            for words, key in parts
            if (number := own[key]) is not None and (words != "MACs" or kind == "depthwise")
        )

    rows = [
        ("parameters", *cells(lambda p: f"{p.params:,}")),
        ("MACs", *cells(lambda p: f"{p.macs / 1e6:,.2f} M")),
        ("FLOPs (2 per MAC)", *cells(lambda p: f"{p.flops / 1e6:,.2f} M")),
        ("activations", *cells(lambda p: f"{p.activations / 1e6:,.2f} M")),
        ("kernels, unfused", *cells(lambda p: str(p.unfused.kernels))),
        ("kernels, fused", *cells(lambda p: str(p.fused.kernels))),
        ("longest path, branches", *cells(
            lambda p: f"{p.fused.longest_path}, {p.fused.branches} "
            f"(fragmentation {p.fused.fragmentation:.2f})")),
        ("memory access, unfused", *cells(lambda p: f"{p.unfused.memory_bytes / 1e6:,.2f} MB")),
        ("memory access, fused", *cells(
            lambda p: f"{p.fused.memory_bytes / 1e6:,.2f} MB (weights "
            f"{p.fused.weight_bytes / 1e6:,.2f}, in {p.fused.input_bytes / 1e6:,.2f}, out "
            f"{p.fused.output_bytes / 1e6:,.2f})")),
        ("intensity, fused", *cells(lambda p: f"{p.intensity:.1f} FLOP/B")),
        ("element-wise", *cells(lambda p: share(p, "elementwise"))),
        ("depthwise", *cells(lambda p: share(p, "depthwise"))),
        ("least time", *cells(lambda p: "-" if p.ms is None else f"{p.ms:.4f} ms")),
    ]  # fmt: skip
    size = "x".join(map(str, result.resolution))
    where = f" on {result.device}" if result.device else ""
    _table(
        f"{result.model}{where}: {result.precision}, batch {result.batch}, {size}",
        ("", *(f"{form.graph_form} form" if form.deploy or len(forms) > 1 else form.graph_form
               for form in forms)),
        rows,
    )  # fmt: skip
    lines = []
    for index in result.most_expensive(count):
        layer = result.layers[index]
        time = result.times[index] if result.times else None
        lines.append(
            (
                layer.name,
                layer.module,
                " + ".join(layer.operators),
                KINDS[layer.kind].split(" (")[0],
                layer.dtype,
                "x".join(map(str, layer.out_shape)),
                f"{layer.macs / 1e6:.2f}",
                f"{layer.memory_bytes / 1e6:.3f}",
                f"{layer.intensity:.1f}",
                "-" if time is None else f"{1e3 * time.ms:.2f}",
                "-" if time is None else time.bound,
            )
        )
    _table(
        f"the {len(lines)} most expensive of {len(result.layers)} layers, by "
        f"{'time' if result.times else 'bytes'}",
        (
            "layer",
            "module",
            "operators",
            "kind",
            "type",
            "output",
            "MACs M",
            "MB",
            "FLOP/B",
            "us",
            "bound",
        ),
        lines,
    )
    for finding in result.findings:
        print(f"{finding.rule}: {finding}")
    if result.note:
        print(result.note)


def _ceilings_parser(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="this machine's CPU, or the GPU in it by a "
                        "name of `litezoo devices` (default: cpu)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results")


def _ceilings(args: Namespace) -> None:
    from litezoo.benchmarks.ceilings import ceilings_table, measure_ceilings, write_ceilings

    with _steps() as progress:
        found = measure_ceilings(args.device, threads=args.threads, progress=progress)
    folder = None if args.results is None else args.results / "ceilings"
    file = write_ceilings(found, folder=folder)

    def text() -> None:
        _table(
            f"{found.machine.versions.get('gpu', found.machine.cpu)}, {found.threads} threads",
            ("what", "dtype", "library", "value", "unit", "spread", ""),
            ceilings_table(found),
        )
        peaks = ", ".join(
            f"{dtype} {peak:.4g}" for dtype, peak in found.peak_tera_ops_per_s.items()
        )
        layers = ", ".join(f"{name} {cost:.3g}" for name, cost in found.layer_us.items())
        print(
            f"tera-operations a second: {peaks}\n"
            f"GB a second, read plus written: {found.memory_gb_per_s:.4g} from memory, "
            f"{found.cache_gb_per_s:.4g} in the cache\n"
            f"us of a session that does nothing: {found.launch_us:.3g}; of each further layer: "
            f"{layers}"
        )
        for label, reason in found.not_measured.items():
            print(f"{label}: not measured ({reason})")
        print(f"ceilings: {file}")

    _show(found, as_json=args.json, text=text)


def _guidelines_parser(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="a name of `litezoo devices` that is here "
                        "(default: cpu)")  # fmt: skip
    parser.add_argument("--runtime", help="a runtime, or pytorch-eager (default: the device's "
                        "first that can run here)")  # fmt: skip
    parser.add_argument("--precision", default="fp32", help="default: fp32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, on which "
                        "differences under 15 %% can be told)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--rules", nargs="+", default=[], metavar="RULE",
                        help="only these (default: all)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="smaller networks, fewer rounds")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results")
    parser.add_argument("--out", type=Path, default=Path("guidelines.html"),
                        help="the page of drawings to write")  # fmt: skip


def _guidelines(args: Namespace) -> None:
    from litezoo.models.errors import require

    require("plotly", purpose="the drawings", extra="report")  # before anything slow
    from litezoo.benchmarks.draw_guidelines import write_guidelines
    from litezoo.benchmarks.guidelines import (
        append_guidelines,
        compare_runs,
        guidelines_file,
        measure_guidelines,
        read_guidelines,
    )

    folder = None if args.results is None else args.results / "guidelines"
    file = guidelines_file(args.device, folder=folder)
    before = read_guidelines([file]) if file.is_file() else []
    with _steps() as progress:
        run = measure_guidelines(
            args.device,
            runtime=args.runtime,
            precision=args.precision,
            threads=args.threads,
            batch=args.batch,
            quick=args.quick,
            rules=args.rules,
            progress=progress,
        )
    rows = run.rows
    append_guidelines(rows, folder=folder)
    write_guidelines([*before, *rows], args.out)
    agreement = compare_runs(rows, before)

    def text() -> None:
        _table(
            f"{rows[0].machine.versions.get('gpu', rows[0].machine.cpu)}: {rows[0].runtime} "
            f"{rows[0].precision}, batch {args.batch}, {args.threads} threads; ratio: cost of the "
            "one over the other's",
            ("rule", "verdict", "ratio", "95 %", "noise", "compared"),
            [
                (
                    row.rule,
                    row.verdict + (" (close)" if row.close else ""),
                    f"{row.ratio:.2f}",
                    f"{row.low:.2f} to {row.high:.2f}",
                    f"{row.band:.0%}",
                    f"{row.slow} / {row.fast}" + (", per MAC" if row.per == "mac" else ""),
                )
                for row in rows
            ],
        )
        for row in rows:
            if "; " in row.finding.partition("is noise")[2]:
                print(f"{row.rule}: {row.finding.rpartition('; ')[2]}")
        for experiment, reason in run.left_out.items():
            print(f"{experiment}: not measured ({reason})")
        if agreement.compared:
            same = agreement.compared - len(agreement.differ)
            print(f"as in the run before: {same} of {agreement.compared} verdicts")
        for difference in agreement.differ:
            print(f"  {difference}")
        print(f"appended {len(rows)} rows to {file}\ndrawings: {args.out}")

    values = {
        "rows": rows,
        "left_out": run.left_out,
        "compared": agreement.compared,
        "differ": agreement.differ,
    }
    _show(values, as_json=args.json, text=text)


def _report_parser(parser: ArgumentParser) -> None:
    parser.add_argument("results", nargs="*", type=Path, help="default: benchmarks/results/*.jsonl")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    parser.add_argument("--readme", type=Path, help="refresh the table in this file, and the "
                        "pictures in docs/pictures beside it, instead")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, "
                        "status 3 if it is not up to date")  # fmt: skip


def _report(args: Namespace) -> None:
    from litezoo.benchmarks.draw_pictures import pictures_are_fresh, write_pictures
    from litezoo.benchmarks.results import read_rows, refresh_readme
    from litezoo.benchmarks.rows import results_folder
    from litezoo.models.errors import CheckFailed

    files = args.results or sorted(results_folder().glob("*.jsonl"))
    if not files:
        raise MissingError("no results in benchmarks/results yet; measure first: litezoo bench DIR")
    rows = read_rows(files)
    if args.readme is not None:
        pictures = args.readme.parent / "docs" / "pictures"
        same = refresh_readme(args.readme, rows, write=not args.check)
        if args.check and not (same and pictures_are_fresh(rows, pictures)):
            what = f"the pictures in {pictures}" if same else f"the results in {args.readme}"
            raise CheckFailed(f"{what} are not up to date; run: make readme")
        if not args.check:
            write_pictures(rows, pictures)
        target = args.readme
    else:
        from litezoo.benchmarks.report import write_report

        beside = args.results[0].parent if args.results else None
        target = write_report(rows, args.out, folder=beside)
    _show({"written": str(target), "rows": len(rows)}, as_json=args.json,
          text=lambda: print(f"{target}: {len(rows)} rows"))  # fmt: skip


def _pick_parser(parser: ArgumentParser) -> None:
    parser.add_argument("--device", help="a name of `litezoo devices` (required)")
    parser.add_argument("--latency-ms", type=float, help="the budget: most milliseconds a batch")
    parser.add_argument("--throughput", type=float, help="or: least images a second")
    parser.add_argument("--batch", type=int, help="images at once (default: 1 for a latency, else "
                        "what most evidence is of)")  # fmt: skip
    parser.add_argument("--percentile", type=int, default=50, help="of the latency: 50, 90 or 99 "
                        "(default: 50)")  # fmt: skip
    parser.add_argument("--resolution", type=int, help="height and width (default: what the "
                        "weights were tested at)")  # fmt: skip
    parser.add_argument("--precision", help="default: the fastest known that keeps the accuracy")
    parser.add_argument("--runtime", help="default: the fastest of the best known")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the fastest known)")
    parser.add_argument("--graph-form", default="deploy", help="train: before fusing, as others "
                        "publish PyTorch's times (default: deploy)")  # fmt: skip
    parser.add_argument("--min-top1", type=float, help="least ImageNet top-1 in %%")
    parser.add_argument("--license", help="of the weights: 'free' (any use, the default), 'any' or "
                        "a name")  # fmt: skip
    parser.add_argument("--task", default="classifier", help="classifier, or backbone: weights "
                        "without classes will do")  # fmt: skip
    parser.add_argument("--avoid-op", nargs="+", default=[], metavar="NAME", help="ONNX operators "
                        "or patterns (squeeze-excite, ...) not to have")  # fmt: skip
    parser.add_argument("--max-params-m", type=float, help="most million parameters")
    parser.add_argument("--max-memory-mib", type=float, help="most memory for weights and the "
                        "activations of a batch")  # fmt: skip
    parser.add_argument("--top", type=int, default=10, help="rows of the front (default: 10)")


def _pick(args: Namespace) -> None:
    if args.device is None:
        raise UsageError("for which device? for example --device t4 (see: litezoo devices)")
    from litezoo.benchmarks.backbones import three_digits
    from litezoo.benchmarks.pick import pick

    found = pick(
        device=args.device, latency_ms=args.latency_ms, throughput=args.throughput,
        batch=args.batch, percentile=args.percentile, resolution=args.resolution,
        precision=args.precision, runtime=args.runtime, threads=args.threads,
        graph_form=args.graph_form, min_top1=args.min_top1, license=args.license, task=args.task,
        avoid_op=args.avoid_op, max_params_m=args.max_params_m,
        max_memory_mib=args.max_memory_mib, top=args.top,
    )  # fmt: skip

    def text() -> None:
        budget = str(found.budget) or "no budget"
        speed = found.conditions.batch > 1 or found.budget.throughput is not None
        _table(
            f"{found.device}: {found.conditions}; {budget}; the Pareto front of latency and top-1, "
            f"of {found.considered} networks",
            ("network", "weights", "top-1 %", "px", "ms", *(["images/s"] * speed), "params M",
             "MiB", "how it is known", "budget"),
            [
                (
                    row.model, row.weights, _percent(row.top1_percent), str(row.resolution),
                    three_digits(row.ms), *([f"{row.images_per_s:.0f}"] * speed),
                    f"{row.params_m:.2f}", f"{row.memory_mib:.1f}", row.label, _meets(row, found),
                )
                for row in found.rows
            ],
        )  # fmt: skip
        print(f"{found.recommended.model if found.recommended else 'no pick'}: {found.reason}")
        for note in found.notes:
            print(f"- {note}")

    _show(found, as_json=args.json, text=text)


def _meets(row: Backbone, found: Pick) -> str:
    """Return whether a row meets the budget, and whether it is the one to take."""
    words = "may miss" if row.may_miss else "" if found.budget.is_open else "meets"
    return f"{words}, picked".lstrip(", ") if row == found.recommended else words


def _predict_parser(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="MODEL", help="a name of `litezoo list`, "
                        "timm:NAME, torchvision:NAME, or an ONNX file")  # fmt: skip
    parser.add_argument("--model", help="the same as an option")
    parser.add_argument("--device", help="a name of `litezoo devices` (required)")
    parser.add_argument("--runtime", help="default: the best known on the device")
    parser.add_argument("--precision", help="default: the best known on the device")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the best known)")
    parser.add_argument("--layout", help="nchw or nhwc (default: the best known)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--resolution", type=int, help="height and width (default: the network's)")
    parser.add_argument("--graph-form", choices=("deploy", "train"), default="deploy",
                        help="train: before fusing (default: deploy)")  # fmt: skip
    parser.add_argument("--explain", action="store_true", help="also kernel by kernel: the time, "
                        "what binds it, the efficiency")  # fmt: skip
    parser.add_argument("--layers", type=int, default=10, help="rows of --explain (default: 10)")
    parser.add_argument("--fit", type=Path, metavar="ROWS", help="first fit the model to your own "
                        "rows: .csv with model,ms,... or .jsonl of litezoo bench")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("fits"), help="the folder that --fit "
                        "writes to (default: fits)")  # fmt: skip


def _predict(args: Namespace) -> None:
    if args.device is None:
        raise UsageError("for which device? for example --device t4 (see: litezoo devices)")
    if None not in (args.name, args.model):
        raise UsageError(f"{args.name} and --model {args.model} are two networks; give one")
    model = args.name or args.model
    values: dict[str, Any] = {}
    if args.fit is not None:
        values["fit"] = _fit(args)
    elif model is None:
        raise UsageError("which network? for example: litezoo predict repvgg_a0 --device t4")
    found = None
    if model is not None:
        from litezoo.benchmarks.predict import predict

        with _fits_in(args.out if "fit" in values else None), _steps() as progress:
            progress(f"predicting {model}")
            found = predict(
                model, device=args.device, runtime=args.runtime, precision=args.precision,
                batch=args.batch, graph_form=args.graph_form, layout=args.layout,
                threads=args.threads, resolution=args.resolution,
            )  # fmt: skip
        values |= {**_plain(found), "images_per_s": found.images_per_s}
        if not args.explain:
            del values["kernels"], values["times"]

    def text() -> None:
        if "fit" in values:
            fit = values["fit"]
            print(
                f"fitted to {fit.rows} rows ({fit.left_out} left out): families left out are "
                f"predicted within {fit.unseen.median:.0%} (median), {fit.unseen.p90:.0%} (90 %)"
                + (f"; {fit.note}" if fit.note else "")
                + f"\nto use it: export LITEZOO_FITS={args.out.resolve()}"
            )
        if found is not None:
            _predict_text(found, args.layers if args.explain else 0)

    _show(values, as_json=args.json, text=text)


def _fit(args: Namespace) -> Fit:
    """Fit the model to a user's rows and write that."""
    from litezoo.benchmarks.fit import write_fits
    from litezoo.benchmarks.predict import find_target, fit_rows, read_user_rows

    target = find_target(
        args.device, runtime=args.runtime, precision=args.precision, layout=args.layout,
        threads=args.threads,
    )  # fmt: skip
    with _steps() as progress:
        progress(f"fitting {target} to {args.fit}")
        rows = read_user_rows(args.fit, target=target, graph_form=args.graph_form)
        fit = fit_rows(rows, target=target).fit
    write_fits([fit], args.out)
    return fit


@contextmanager
def _fits_in(folder: Path | None) -> Iterator[None]:
    """Look fits up in `folder` first, for a while."""
    before = os.environ.get("LITEZOO_FITS", "")
    if folder is not None:
        os.environ["LITEZOO_FITS"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["LITEZOO_FITS"] = before


def _predict_text(found: Prediction, rows: int) -> None:
    size = "x".join(map(str, found.resolution))
    how = found.why if found.why.startswith(found.basis) else f"{found.basis}: {found.why}"
    print(
        f"{found.model} on {found.target}: batch {found.batch}, {size}, {found.graph_form} form\n"
        f"  {found.ms:.4g} ms a batch ({found.low_ms:.4g} to {found.high_ms:.4g}: 80 % of "
        f"comparable rows), {found.images_per_s:.4g} images/s\n"
        f"  {how}"
    )
    if rows:
        from litezoo.benchmarks.latency import CLASSES

        total = sum(time.ms for time in found.times)
        order = sorted(found.times, key=lambda time: -time.ms)
        _table(
            f"the {min(rows, len(order))} longest of {len(order)} kernels",
            ("kernel", "kind", "us", "of all", "bound by", "compute us", "memory us", "efficiency"),
            [
                (
                    time.name, CLASSES[time.kind], f"{1e3 * time.ms:.2f}", f"{time.ms / total:.1%}",
                    time.bound, f"{1e3 * time.compute_ms:.2f}", f"{1e3 * time.memory_ms:.2f}",
                    f"{time.efficiency:.0%}",
                )
                for time in order[:rows]
            ],
        )  # fmt: skip


def _train(words: Sequence[str]) -> int:
    """Train: our few words here, everything else goes to LightningCLI as it is."""
    parser = argparse.ArgumentParser(
        prog="litezoo train MODEL",
        allow_abbrev=False,
        description="Train or fine-tune MODEL (a model or a family of `litezoo list`) by a "
        "recipe (LightningCLI).",
        epilog="Every option of LightningCLI can follow, such as --trainer.max_epochs 3, "
        "--data.batch_size 128, --model.weights TAG; all of them: litezoo train MODEL --options",
    )
    parser.add_argument("--data", help="'digits' (embedded, the default) or a folder with "
                        "train/<class>/*.jpg and val/<class>/*.jpg")  # fmt: skip
    parser.add_argument("--recipe", type=Path, help="LightningCLI YAML (default: recipes/train)")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/MODEL/<time>)")
    parser.add_argument("--resume", action="store_true", help="go on from last.ckpt of the last "
                        "run (of MODEL, or the one in --out)")  # fmt: skip
    parser.add_argument("--search-scales", action="store_true", help="RepOpt-VGG: search its "
                        "optimizer's scales, for --model.optimizer.scales FILE")  # fmt: skip
    parser.add_argument("--qat", action="store_true", help="go on from trained weights, which "
                        "--model.weights names, with the rounding of int8")  # fmt: skip
    parser.add_argument("--options", action="store_true", help="show LightningCLI's options")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args, rest = parser.parse_known_args(words)
    # MODEL is the first word that is not the value of one of LightningCLI's options
    name = None
    for index, word in enumerate(rest):
        option = rest[index - 1] if index else ""
        if not word.startswith("-") and ("=" in option or not option.startswith("-")):
            name = rest.pop(index)
            break

    from litezoo.models.catalogue import resolve_name
    from litezoo.models.errors import require
    from litezoo.recipes.runs import last_run

    if name is None and not args.resume:
        raise UsageError("which model? for example: litezoo train repvgg_a0 (see: litezoo list)")
    model = None if name is None else resolve_name(name)
    run = None
    if args.resume:
        if args.search_scales and args.out is None:
            raise UsageError("which search is to go on? name its folder: --out runs/scales/...")
        run = args.out or last_run(model or "*")
        if run is None:
            raise UsageError("there is no run to go on with in runs/; start one: litezoo train")
    require("pytorch_lightning", purpose="training", extra="train")
    require("torchmetrics", purpose="training", extra="train")
    from litezoo.recipes.qat import train_quantized
    from litezoo.recipes.scale_search import ScaleSearchResult, search_scales
    from litezoo.recipes.trainer import TrainResult, train

    if args.qat and args.search_scales:
        raise UsageError("a search of scales is no training with rounding; take one of --qat and "
                         "--search-scales")  # fmt: skip
    work: Callable[..., TrainResult | ScaleSearchResult]
    work = search_scales if args.search_scales else train_quantized if args.qat else train
    done = work(
        model,
        data=args.data,
        recipe=args.recipe,
        out=args.out,
        resume=run,
        progress=lambda step: print(step, file=sys.stderr, flush=True),
        overrides=["--help"] if args.options else rest,
    )
    result = done.run if isinstance(done, ScaleSearchResult) else done

    def text() -> None:
        if isinstance(done, ScaleSearchResult):
            print(f"scales: {done.scales}")
        print(
            f"{result.model} on {result.data}: test top-1 {result.test_top1_percent:.2f} % "
            f"(validation {result.val_top1_percent:.2f} %), {result.epochs} epochs in "
            f"{result.seconds:.0f} s, {result.images_per_s:.0f} img/s, {result.precision}\n"
            f"checkpoint: {result.checkpoint}"
        )

    _show(done, as_json=args.json, text=text)
    return 0


_VERBS: dict[str, tuple[str, Callable[[ArgumentParser], None], Callable[[Namespace], None]]] = {
    "list": ("the models", _list_parser, _list),
    "info": ("one model: counts, paper, weights", _info_parser, _info),
    "devices": ("the target devices", _devices_parser, _devices),
    "export": ("build verified engines for a device", _export_parser, _export),
    "quantize": ("what int8 would cost, without data", _quantize_parser, _quantize),
    "verify": ("check an artifact: hashes, loading, parity", _verify_parser, _verify),
    "bench": ("measure artifacts and append to the results", _bench_parser, _bench),
    "profile": ("what a network costs, layer by layer", _profile_parser, _profile),
    "ceilings": ("measure this machine's peaks", _ceilings_parser, _ceilings),
    "guidelines": ("measure the design rules on a chip", _guidelines_parser, _guidelines),
    "pick": ("the right networks for a device and a budget", _pick_parser, _pick),
    "predict": ("what a network would take on a device", _predict_parser, _predict),
    "report": ("one HTML page of all results", _report_parser, _report),
}
_TRAIN_HELP = "train a model by a recipe"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="litezoo",
        exit_on_error=False,
        description="Lightweight CNNs: train, fuse, export, verify, measure.",
        epilog="exit status: 0 ok, 2 wrong usage, 3 a check failed, 4 something needed is missing",
    )
    commands = parser.add_subcommands(dest="verb", required=True, metavar="VERB")
    commands.add_subcommand("train", ArgumentParser(exit_on_error=False), help=_TRAIN_HELP)
    for name, (what, fill, _) in _VERBS.items():
        verb = ArgumentParser(
            description=what[0].upper() + what[1:] + ".",
            exit_on_error=False,
            formatter_class=argparse.HelpFormatter,
        )
        fill(verb)
        verb.add_argument("--json", action="store_true", help="print JSON for programs")
        commands.add_subcommand(name, verb, help=what)
    return parser


def _options(words: Sequence[str]) -> list[str]:
    """Return the options of the verb that `words` begin with."""
    if not words or words[0] not in _VERBS:
        return []
    verb = ArgumentParser()
    _VERBS[words[0]][1](verb)
    return [option for action in verb._actions for option in action.option_strings]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; a user's mistake never shows a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and not words[0].startswith("-"):
            if words[0] not in {*_VERBS, "train"}:
                raise unknown_name("command", words[0], [*_VERBS, "train"])
        if words[:1] == ["train"]:
            return _train(words[1:])
        parser = _parser()
        if not words:
            parser.print_help(sys.stderr)
            return 2
        try:
            args = parser.parse_args(words)
        except ArgumentError as error:
            raise wrong_words(str(error), _options(words)) from error
        _VERBS[args.verb][2](args[args.verb])
    except LitezooError as error:
        if "--json" in words:
            print(json.dumps({"error": str(error), "status": error.exit_status}))
        print(f"litezoo: {error}", file=sys.stderr)
        return error.exit_status
    except SystemExit as error:  # --help, or a run that was told to end
        return error.code if isinstance(error.code, int) else 0
    except KeyboardInterrupt:
        print("litezoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
