"""The README's example runs as printed, and what it says about itself is true."""

import pathlib
import re
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs_as_printed(capsys):
    codes = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(codes[0].strip().splitlines()) <= 15
    scope = {}
    for code in codes:
        exec(compile(code, "README.md", "exec"), scope)
    assert np.shape(scope["lipschitz"]) == (1,)
    assert np.isfinite(scope["lipschitz"]).all()
    assert np.shape(scope["margins"]) == (1, 10)
    assert np.isfinite(scope["margins"]).all()
    assert np.shape(scope["radius"]) == np.shape(scope["certificate"].certified) == (1,)
    assert scope["radius"] > 0


def test_local_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_api_page_is_what_the_docstrings_say():
    sys.path.insert(0, str(ROOT / "docs"))
    import generate_api

    assert (ROOT / "docs" / "api.md").read_text() == generate_api.page(), "run python docs/generate_api.py"
