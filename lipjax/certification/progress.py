"""Progress of a certification, in a file: who was killed goes on.

A stage that saw an example has drawn its starts. The file remembers who was seen, so that nobody's starts are drawn
again; the batch that was under way is repeated with the same starts for the same masks, which is the same event.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import time
import zipfile
import zlib
from typing import Any

import jax
import numpy as np

from lipjax.certification.certifier import Certifier
from lipjax.certification.evidence import Evidence
from lipjax.certification.stages import Progress


class ProgressFile:
    """What is known so far, on disk.

    Args:
        path: the file, or None to keep nothing.
        facts: what the evaluation is about, ready for JSON; progress of another one is refused.
        every: seconds between two saves.
    """

    def __init__(self, path: pathlib.Path | None, facts: dict[str, Any], every: float) -> None:
        self.path, self.facts, self.every = path, json.loads(json.dumps(facts)), every
        self.laps: dict[str, float] = {}
        self.lapped = self.saved = time.perf_counter()

    def restore(self, evidence: Evidence, certifier: Certifier) -> Progress:
        """Where to go on; evidence and ledger are filled in as they were.

        Raises:
            ValueError: the file is of another evaluation, or cannot be read.
        """
        progress = Progress(0, 0, np.zeros(len(evidence.label), bool))
        if self.path is None or not self.path.exists():
            return progress
        try:
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            said = json.loads(str(arrays.pop("said")))
            visited = arrays.pop("visited")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path} cannot be read: {error}; delete it and certify from the beginning") from None
        for name in sorted(self.facts.keys() | said["facts"].keys()):
            now, then = self.facts.get(name), said["facts"].get(name)
            if now != then:
                raise ValueError(
                    f"{self.path} is of a certification with {name}={then}, not {now}: give the same options, or do "
                    "not resume"
                )
        fields = {field.name for field in dataclasses.fields(evidence)}
        if missing := fields - arrays.keys():  # norms without the rows that they are norms of would prove anything
            raise ValueError(
                f"{self.path} lacks {', '.join(sorted(missing))}; delete it and certify from the beginning"
            )
        for name in fields:
            setattr(evidence, name, arrays[name])
        certifier.used[0, evidence.local] = True
        ledger = said["ledger"]
        certifier.ledger.starts, certifier.ledger.products = ledger["starts_drawn"], ledger["products"]
        certifier.ledger.largest_gap = math.nan if ledger["largest_gap"] is None else ledger["largest_gap"]
        self.laps = said["laps"]
        return Progress(said["rung"], said["round"], visited)

    def lap(self, evidence: Evidence, certifier: Certifier, name: str, progress: Progress) -> None:
        """The time since the last lap goes to a stage; the file is written if it is old."""
        now = time.perf_counter()
        self.laps[name], self.lapped = self.laps.get(name, 0.0) + now - self.lapped, now
        if self.path is not None and now - self.saved >= self.every:
            self.write(evidence, certifier, progress)
            self.saved = time.perf_counter()

    def write(self, evidence: Evidence, certifier: Certifier, progress: Progress) -> None:
        """Write the file in one move."""
        if self.path is None:
            return
        said = {"facts": self.facts, "rung": progress.rung, "round": progress.round, "laps": self.laps}
        said["ledger"] = certifier.ledger.facts()
        arrays = {field.name: getattr(evidence, field.name) for field in dataclasses.fields(evidence)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial.npz")
        np.savez(partial, said=np.asarray(json.dumps(said)), visited=progress.visited, **arrays)
        partial.replace(self.path)


def digest(tree: Any) -> str:
    """Hash of the arrays of a pytree."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(array.tobytes())
    return found.hexdigest()
