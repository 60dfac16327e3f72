"""Runs from configs: data sets, architectures, the commands and what they write."""

import importlib.util

_NEEDED = ("absl", "ml_collections", "orbax", "tqdm", "matplotlib")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ImportError(f'lipjax.experiments needs {", ".join(_missing)}: pip install "lipjax[train]"')
