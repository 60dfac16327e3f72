"""Checkpoints of a run, by Orbax: the newest states to resume from, and the best parameters.

Every checkpoint carries the hash of what it holds. One that cannot be read or does not fit its hash is refused, and
the one before it is used.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lipjax.errors import InputError

Arrays = dict[str, np.ndarray]
# The parameters, the trained slopes of the dual, and the rest of what a step changes.
ITEMS = ("params", "rule", "training")


class Checkpoints:
    """A folder of checkpoints, numbered by epoch.

    Args:
        folder: made if missing.
        keep: how many of the newest to keep; two, so that one broken checkpoint loses one epoch.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2) -> None:
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        handlers = {name: ocp.PyTreeCheckpointHandler() for name in ITEMS} | {"metadata": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, epoch: int, items: dict[str, Arrays], metadata: dict[str, Any]) -> None:
        """Write one checkpoint and wait until it is complete: the next step overwrites the arrays.

        Args:
            epoch: its number.
            items: arrays, by a name of :data:`ITEMS`; empty ones are left out.
            metadata: small facts, as JSON.
        """
        kept = {name: arrays for name, arrays in items.items() if arrays}
        facts = {**metadata, "epoch": epoch, **{f"{name}_sha256": sha256(arrays) for name, arrays in kept.items()}}
        if epoch in self._manager.all_steps():
            self._manager.delete(epoch)  # a refused one, or one of a run that was killed before the next save
        saved = {name: ocp.args.PyTreeSave(arrays) for name, arrays in kept.items()}
        self._manager.save(epoch, args=ocp.args.Composite(**saved, metadata=ocp.args.JsonSave(facts)), force=True)
        self._manager.wait_until_finished()

    def drop_after(self, epoch: int) -> None:
        """Delete the checkpoints of later epochs, which a resumed run makes again."""
        for later in self._manager.all_steps():
            if later > epoch:
                self._manager.delete(later)

    def restore(self, items: tuple[str, ...] = ("params",)) -> tuple[dict[str, Arrays], dict[str, Any]] | None:
        """The newest checkpoint that is whole.

        Args:
            items: what to read, names of :data:`ITEMS`; one that was empty when it was saved is empty again.

        Returns:
            The items by name, and the metadata; None where there is no checkpoint at all.

        Raises:
            InputError: there are checkpoints, but none is whole.
        """
        epochs = sorted(self._manager.all_steps(), reverse=True)
        for epoch in epochs:
            try:
                return self._read(epoch, items)
            except MemoryError:
                raise
            except Exception as error:  # a damaged file can raise anything in the layers below
                reason = " ".join(str(error).split())[:200]
                print(
                    f"refusing checkpoint {self.folder / str(epoch)}: {type(error).__name__}: {reason}", file=sys.stderr
                )
        if epochs:
            raise InputError(f"no checkpoint in {self.folder} can be read; train again into another --workdir")
        return None

    def _read(self, epoch: int, items: tuple[str, ...]) -> tuple[dict[str, Arrays], dict[str, Any]]:
        facts = self._manager.restore(epoch, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
        written = [item for item in items if f"{item}_sha256" in facts]
        trees = self._manager.item_metadata(epoch)
        # As host arrays, so that a checkpoint of one kind or number of devices is read on any other.
        wanted = {
            item: ocp.args.PyTreeRestore(
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), trees[item].tree)
            )
            for item in written
        }
        found = self._manager.restore(epoch, args=ocp.args.Composite(**wanted))
        for item in written:
            if sha256(found[item]) != facts[f"{item}_sha256"]:
                raise ValueError(f"its {item} do not fit their hash")
        return {item: found[item] if item in written else {} for item in items}, facts


def flat(tree: Any) -> Arrays:
    """A pytree as host arrays by name; empty arrays, which Orbax cannot write, are left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    return {name: array for name, array in named.items() if array.size}


def unflat(like: Any, arrays: Arrays) -> Any:
    """The inverse of :func:`flat`, for a pytree of the same structure and shapes.

    Raises:
        InputError: the names or shapes differ, which means that the checkpoint is of another configuration.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found = arrays.get(name) if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        if found is None or found.shape != leaf.shape:
            there = "nothing" if found is None else f"shape {found.shape}"
            raise InputError(f"the checkpoint has {there} for {name}, the configuration needs shape {leaf.shape}")
        leaves.append(found.astype(leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, leaves)


def sha256(arrays: Arrays) -> str:
    """Hash of named arrays: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
