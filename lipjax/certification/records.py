"""Records: files of certificates with all that is needed to check them, and their way back."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pathlib
import zipfile
import zlib
from typing import Any

import jax
import numpy as np

from lipjax.errors import InputError
from lipjax.files import replace_text
from lipjax.networks.graph import Network

FORMAT = 2  # of files of certificates: networks are hashed as graphs
FIELDS = ("level", "delta", "eps", "dtype", "versions", "network_sha256", "dataset", "split", "seed")


def fingerprint(network: Network) -> str:
    """Hash of a network: its layers with their options, and the bytes of its parameters."""
    digest = hashlib.sha256()
    for part in (*network.nodes, network.head):
        digest.update(_description(part).encode())
    for leaf in jax.tree.leaves(network):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_certificates(folder: pathlib.Path, columns: dict[str, np.ndarray], summary: dict[str, Any]) -> None:
    """Write ``certificates.npz``, ``certificates.csv`` (one row per example) and ``summary.json`` into a folder.

    Args:
        folder: is made where it does not exist.
        columns: one array per column, of one length.
        summary: ready for JSON, with at least :data:`FIELDS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "certificates.npz", summary=np.asarray(json.dumps(summary)), **columns)
    with (folder / "certificates.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def load_certificates(path: str | pathlib.Path, network: Network) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of certificates that ``certify.py`` wrote, for the network that they are about.

    Args:
        path: a ``certificates.npz``.
        network: the network, read by :func:`lipjax.from_flax` from the model that was certified.

    Returns:
        ``(columns, summary)``: arrays by name, one entry per example, and what they rest on: level, delta, eps, dtype,
        versions, domain, data set and split, seed of the key.

    Raises:
        InputError: the file cannot be read, lacks something, is of an older version, or is about another network.
    """
    try:
        with pathlib.Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        summary = json.loads(str(columns.pop("summary")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not a whole file of certificates: {error}; run certify.py again") from None
    summary.setdefault("domain", "ball")  # there was no other before 0.4.0
    missing = [name for name in FIELDS if name not in summary]
    if missing:
        raise InputError(f"{path} does not state {', '.join(missing)}; run certify.py again")
    if summary.get("format", 1) != FORMAT:
        version = summary["versions"].get("lipjax", "of another version")
        raise InputError(
            f"{path} was written by lipjax {version}, which described networks in another way, so that it "
            "cannot be told whether they are about this one; run certify.py again"
        )
    ours = fingerprint(network)
    if summary["network_sha256"] != ours:
        raise InputError(
            f"{path} is about the network {summary['network_sha256'][:12]}, not about this one, {ours[:12]}: "
            "its certificates say nothing here; certify this network itself"
        )
    return columns, summary


def _description(part: Any) -> str:
    """The type of a part and its static options, and those of what it holds."""
    parts = [type(part).__name__]
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.metadata.get("static"):
            parts.append(f"{field.name}={value}")
        elif dataclasses.is_dataclass(value):
            parts.append(_description(value))
    return f"({' '.join(parts)})"
