"""Set-up of every test: a compilation cache, strict promotion, and hypothesis without chance or deadlines."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "lipjax_jax_cache"))
# The small programs of operations outside of jit are the most: every file compiles them anew, unless they are kept too.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("lipjax", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("lipjax")


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    """After each file: a process has room for some 65,000 memory maps, and every program takes several of them."""
    yield
    jax.clear_caches()
