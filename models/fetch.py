"""Weights from the Hugging Face hub or a plain URL: fetched whole, checked and cached.

Hub files lie in the hub's own cache (HF_HOME), files of URLs where torch.hub keeps them
(TORCH_HOME), so that what timm or torchvision fetched before is not fetched again. A download that
is cut goes on where it stopped; a file whose content is not the published one is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import urllib.parse
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .catalogue import ModelSpec, Preprocess, Weights
from .errors import CheckFailed, MissingError, UsageError, first_line
from .files import open_checkpoint

__all__ = ["HUB_PREFIX", "fetch_hub_config", "fetch_weights", "find_weights"]

#: `weights="hf-hub:owner/name"` names a repository of the hub, as timm spells it.
HUB_PREFIX = "hf-hub:"


def find_weights(
    spec: ModelSpec, weights: str | os.PathLike[str], *, allow_license: tuple[str, ...] = ()
) -> tuple[Path, Weights | None]:
    """Return the file that `weights` means, fetched if it has to be, and what is known of it.

    `weights` is "default" or a tag of the catalogue, "hf-hub:owner/name", a URL, or a file: a Path,
    or text with a suffix or a slash. Of a URL or a file nothing is known (None).
    """
    if not isinstance(weights, str):
        return Path(weights), None
    if weights.startswith(HUB_PREFIX):
        entry = fetch_hub_config(weights.removeprefix(HUB_PREFIX))[1]
        if entry.licence:
            entry.check_licence(allow_license, model=spec.name)
        return fetch_weights(entry, model=spec.name), entry
    if "://" in weights:
        digest = re.search(r"-([a-f0-9]{8,64})\.", weights)  # torch.hub's convention for names
        known = f"sha256:{digest[1]}" if digest else ""
        entry = Weights(tag=weights, source=weights, digest=known)
        return fetch_weights(entry, model=spec.name), None
    if Path(weights).suffix or "/" in weights or "\\" in weights:
        return Path(weights), None
    entry = spec.get_weights(weights)
    if entry.unreadable:
        raise UsageError(
            f"the weights {entry.tag!r} of {spec.name} are known but cannot be loaded: "
            f"{entry.unreadable} ({entry.source})"
        )
    entry.check_licence(allow_license, model=spec.name)
    return fetch_weights(entry, model=spec.name), entry


def fetch_weights(weights: Weights, *, model: str) -> Path:
    """Download a public checkpoint into the cache, if it is not there, and return its path.

    MissingError, with what to type instead, when it can not be fetched; CheckFailed when what came
    is not the published file.
    """
    try:
        file = _fetch_url(weights) if weights.is_url else _fetch_from_hub(weights)
    except CheckFailed:
        raise
    except Exception as error:
        place = _server(weights.source) if weights.is_url else _hub_endpoint()
        raise MissingError(
            f"cannot fetch {weights.source} from {place} ({_reason(error)}); type one of: "
            f"`--weights FILE` (a checkpoint of yours), `litezoo train {model}` (then export that "
            "run), `--weights random` (untrained, for measuring speed)"
        ) from error
    _check_digest(file, weights.digest)
    return file


def fetch_hub_config(repository: str) -> tuple[dict[str, Any], Weights]:
    """Return a repository's config.json (timm's form) and what it says of the weights beside it."""
    repository, _, revision = repository.partition("@")
    tag = HUB_PREFIX + repository
    entry = Weights(tag=tag, source=repository, revision=revision or "main")
    file = fetch_weights(replace(entry, filename="config.json"), model="MODEL")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        known = config["pretrained_cfg"]
        preprocess = Preprocess.from_dict(
            {k: known[k] for k in ("input_size", "crop_pct", "interpolation", "mean", "std")}
        )
        classes = int(config["num_classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{repository} is no repository of an image classifier in timm's form: its "
            f"config.json is not readable ({_reason(error)})"
        ) from error
    licence = str(known.get("license") or "")
    return config, replace(entry, licence=licence, preprocess=preprocess, num_classes=classes)


def _reason(error: Exception) -> str:
    """Say in one line what went wrong at the bottom, and what to do where a login would help."""
    while type(error).__name__ == "LocalEntryNotFoundError" and isinstance(
        error.__cause__, Exception
    ):  # the hub client's "neither there nor in the cache"
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = "; log in with `hf auth login`" if status in (401, 403) else ""
    return f"{type(error).__name__}: {first_line(error)}{hint}"


def _check_digest(file: Path, digest: str) -> None:
    """Remove the file and raise CheckFailed where its digest does not start with the published one.

    That of a .zip (pytorchcv's releases) is the digest of the file in it.
    """
    kind, _, wanted = digest.partition(":")
    if not wanted:
        return
    found = "unreadable"
    with suppress(zipfile.BadZipFile), open_checkpoint(file) as stream:
        found = hashlib.file_digest(stream, kind).hexdigest()
    if not found.startswith(wanted):
        file.unlink()
        raise CheckFailed(
            f"{file} is not the published file ({kind} {found[:16]}, published {wanted}); it has "
            "been removed, try again"
        )


def _server(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _check_reachable(url: str) -> None:
    """Raise OSError at once where the server cannot be connected to (proxies are not looked at)."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    socket.create_connection((parts.hostname or "", port), timeout=10).close()


# ---------------------------------------------------------------------------------------- the hub


def _hub_endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _fetch_from_hub(weights: Weights) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name, revision = weights.filename, weights.revision
    cached = try_to_load_from_cache(weights.source, name, revision=revision)
    if not isinstance(cached, str):
        _check_reachable(_hub_endpoint())  # the hub client alone retries for 20 s
    file = Path(hf_hub_download(weights.source, name, revision=revision))
    # the hub names large files by their sha256: what lies in the cache must still be that
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        try:
            _check_digest(blob, f"sha256:{blob.name}")
        except CheckFailed:
            file.unlink(missing_ok=True)
            raise
    return file


# -------------------------------------------------------------------------------------- plain URLs


def _fetch_url(weights: Weights) -> Path:
    """Download into torch.hub's folder, going on where an earlier attempt was cut."""
    from huggingface_hub import get_session
    from huggingface_hub.file_download import http_get
    from torch import hub

    name = Path(urllib.parse.urlsplit(weights.source).path).name
    file = Path(hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    _check_reachable(weights.source)
    file.parent.mkdir(parents=True, exist_ok=True)
    head = get_session().head(weights.source, follow_redirects=True)
    head.raise_for_status()
    length = head.headers.get("Content-Length")
    size = int(length) if length and "Content-Encoding" not in head.headers else None
    part = file.with_name(f"{name}.incomplete")
    with part.open("ab") as stream:
        start = stream.tell()
        if size is not None and start > size:
            stream.truncate(start := 0)
        http_get(
            weights.source,
            stream,
            resume_size=start,
            expected_size=size,
            displayed_filename=name,
        )
    part.rename(file)
    return file
