"""The code in README and docs runs as printed, and what they say about themselves is true."""

import pathlib
import re
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(page, language):
    """What stands between fences of a language, "" for none."""
    return [text for name, text in re.findall(r"```(\w*)\n(.*?)```", page, flags=re.DOTALL) if name == language]


def test_the_examples_run_as_printed_and_print_what_is_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    example, *rest = blocks(README, "python")
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    shown = blocks(README, "")[0]
    number = r"True|False|\d\.\d+"
    printed, claimed = (re.findall(number, text) for text in (capsys.readouterr().out, shown))
    assert len(printed) == len(claimed) > 0
    for found, said in zip(printed, claimed, strict=True):
        assert found == said or float(found) == pytest.approx(float(said), rel=2e-3)
    for code in rest:
        exec(compile(code.replace("/tmp/digits", str(tmp_path)), "README.md", "exec"), scope)
    assert np.shape(scope["margins"]) == (2, 10)
    assert scope["run"].network.num_classes == 10
    assert scope["summary"]["counts"]["examples"] == 10


def test_the_page_about_parts_of_ones_own_runs_as_printed(capsys):
    scope = {}
    for code in blocks((ROOT / "docs" / "extending.md").read_text(), "python"):
        exec(compile(code, "extending.md", "exec"), scope)
    # The Frobenius norm is an upper bound of the one that the default level bounds.
    tight, loose = (np.fromstring(line.strip("[]"), sep=" ") for line in capsys.readouterr().out.splitlines()[:2])
    assert np.all(tight < loose)


def test_the_page_about_models_of_others_runs_as_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for code in blocks((ROOT / "docs" / "models.md").read_text(), "python"):
        exec(compile(code, "models.md", "exec"), {})
    assert "True" in capsys.readouterr().out


def test_local_links_lead_somewhere():
    pages = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_api_page_is_what_the_docstrings_say():
    sys.path.insert(0, str(ROOT / "docs"))
    import generate_api

    assert (ROOT / "docs" / "api.md").read_text() == generate_api.page(), "run python docs/generate_api.py"
