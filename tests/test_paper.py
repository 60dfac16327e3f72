"""Tables and figures of the paper from one command: what is missing is run once, the rest is shown."""

import csv
import dataclasses
import functools
import json
import pathlib

import pytest

from lipjax.errors import InputError
from lipjax.experiments import certifying, runs, settings
from reproduction import published, tables
from reproduction.published import Cell, Row, Table

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SMALL = (
    "--config.model.architecture=mlp",
    "--config.probe.size=0",
    "--config.schedule.batch_size=500",
    "--config.certify.batch_size=10",  # of 20 images and of 30: compiled once
)
CELLS = [row.cell for table in published.TABLES.values() for row in table.rows if row.cell]


def options(folder, **changes):
    changes = {"scale": 0.02, "limit": 20, "overrides": SMALL, **changes}
    return tables.Options(folder, CONFIGS, **changes)


@pytest.fixture
def small(monkeypatch):
    """A table of three cells that can be run, one of them without its data, and one method that we do not have."""
    rows = (
        Row("digits", "Standard", (99.0, 45.4, None), Cell("digits", "standard")),
        Row("digits", "GloRo", (92.9, 68.9, 50.1), Cell("digits", "gloro"), (0.1, 0.2, None), seconds=72.0),
        Row(
            "MNIST", "IBP", (1.0, 2.0, 3.0), Cell("mnist_4c3f", "ibp", {"data.dir": "nowhere", "data.cache": "nowhere"})
        ),
        Row("digits", "CAP", (88.1, 67.9, 44.5)),
    )
    monkeypatch.setitem(published.TABLES, "table1", Table("A small table", published.ACCURACIES, rows))
    # Compiles faster than true bounds.
    monkeypatch.setattr(certifying, "certify_run", functools.partial(certifying.certify_run, level="estimate"))
    monkeypatch.setattr(published, "FIGURE_CELLS", dict.fromkeys(("Local-Lip-B", "BCP"), Cell("digits", "gloro")))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The runs of the small table and of the figures: what one test has run, the next one finds."""
    return tmp_path_factory.mktemp("paper")


def lines_of(path):
    with path.with_suffix(".csv").open() as file:
        return {(line["setting"], line["method"]): line for line in csv.DictReader(file)}


@pytest.mark.slow
def test_a_table_is_measured_once_and_says_what_is_missing(small, workdir, monkeypatch, capsys):
    path = tables.table("table1", options(workdir, only="*standard*"))
    lines = lines_of(path)
    standard = lines["digits", "Standard"]
    assert float(standard["clean, paper"]) == 99
    assert float(standard["clean, difference"]) == pytest.approx(float(standard["clean, ours"]) - 99, abs=0.02)
    assert (standard["certified, paper"], standard["certified, difference"]) == ("unknown", "")
    assert (standard["epochs"], standard["seeds"], standard["test images"]) == ("2", "1", "20 of digits")
    assert (workdir / "digits-standard-seed0" / "learning_curves.png").exists()
    assert lines["digits", "GloRo"]["remark"] == "not run; at full scale 100 epochs, 2 hours of the paper's 1 V100"
    assert lines["digits", "CAP"]["remark"] == "method not in lipjax"
    assert "|digits|Standard|99|" in path.read_text()
    # Again with all cells: the finished one is not run again, one lacks its data, one is made.
    trained = []
    train = runs.train
    monkeypatch.setattr(
        runs, "train", lambda config, *a, **k: (trained.append(config.method.name), train(config, *a, **k))
    )
    with pytest.raises(InputError, match=r"mnist_4c3f-ibp\S*-seed0 could not be made; .*table1.md"):
        tables.table("table1", options(workdir))
    lines = shown = lines_of(path)
    assert trained == ["gloro", "ibp"]
    assert lines["digits", "GloRo"]["clean, paper"] == "92.9 +- 0.1"
    assert lines["digits", "GloRo"]["remark"] == ""
    assert "no data set 'mnist'" in lines["MNIST", "IBP"]["remark"]
    assert "no data set 'mnist'" in capsys.readouterr().err
    # More images, another scale or another config are another measurement; more images train nothing again.
    trained.clear()
    tables.table("table1", options(workdir, limit=30, only="digits-standard"))
    assert trained == []
    lines = lines_of(tables.table("table1", options(workdir, limit=30, only="")))
    assert lines["digits", "GloRo"]["seeds"] == ""
    # So is another config; and what the user makes in the folder of a run is none.
    changed = options(workdir, overrides=(*SMALL, "--config.schedule.learning_rate=0.01"), only="")
    assert lines_of(tables.table("table1", changed))["digits", "GloRo"]["seeds"] == ""
    with pytest.raises(InputError, match="digits-gloro-seed0 could not be made"):
        tables.table("table1", dataclasses.replace(changed, only="digits-gloro"))
    assert "learning_rate=0.01 differs from the run to resume" in capsys.readouterr().err
    certifying.certify_run(workdir / "digits-gloro-seed0", eps=0.01, limit=20)
    again = lines_of(tables.table("table1", options(workdir, only="")))
    assert again["digits", "GloRo"] == shown["digits", "GloRo"]


def test_cells_that_are_not_there_are_refused_and_the_table_stays(small, tmp_path):
    path = tables.table("table1", options(tmp_path, only=""))
    before = path.read_text()
    with pytest.raises(InputError, match="--only='digit-gloro' is none of the cells of table1; .* digits-gloro, "):
        tables.table("table1", options(tmp_path, only="digit-gloro", scale=0.5))
    assert path.read_text() == before


def test_another_scale_in_the_same_folder_is_refused_by_its_name(small, tmp_path, capsys):
    config = tables._config(Cell("digits", "gloro"), 0, options(tmp_path))
    (tmp_path / "digits-gloro-seed0").mkdir()
    settings.save(config, tmp_path / "digits-gloro-seed0")
    with pytest.raises(InputError, match="digits-gloro-seed0 could not be made"):
        tables.table("table1", options(tmp_path, only="digits-gloro", scale=0.5))
    assert "--scale=0.5 makes 50 epochs of it, but the run there was begun with 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("examples", "limit", "enough"), [(20, 20, True), (20, None, False), (20, 30, False), (360, 1000, True)]
)
def test_a_certification_counts_if_it_is_about_as_many_images_as_are_asked_for_or_all(
    examples, limit, enough, tmp_path
):
    found = {"counts": {"examples": examples}, "split_size": 360, "stages": ["global", "local"]}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    assert (tables._summary(tmp_path, limit, ("global", "local")) is not None) == enough
    assert tables._summary(tmp_path, limit, ("global", "local", "dual")) is None


def test_iterations_are_means_over_the_norms_that_were_iterated():
    assert tables._iterations({"products_per_norm": [0.0, 10.0], "iterated_share": [0.0, 0.25]}) == [0.0, 20.0]


@pytest.mark.slow
def test_figures_are_drawn_from_the_logs(small, workdir):
    for name in published.FIGURES:
        assert tables.figure(name, options(workdir)).read_bytes().startswith(b"\x89PNG"), name


def test_unknown_names_are_refused_with_the_list(tmp_path):
    with pytest.raises(InputError, match="'table3' is unknown; give one of table1, table2, .*figure7"):
        tables.table("table3", options(tmp_path))


@pytest.mark.parametrize(
    "cell", {cell.name: cell for cell in [*CELLS, *published.FIGURE_CELLS.values()]}.values(), ids=str
)
def test_every_cell_is_a_config_that_parses(cell, tmp_path):
    config = tables._config(cell, 3, options(tmp_path, scale=1.0, overrides=()))
    assert config.method.name == cell.method
    assert config.seed == 3
    for key, value in cell.overrides.items():
        assert settings._lookup(config, key) == value


def test_the_same_run_has_the_same_numbers_in_all_tables():
    """Of tables that print the best seed, as far as the paper agrees with itself."""
    by_cell = {}
    for name in ("table1", "table2", "table6"):
        for row in published.TABLES[name].rows:
            if row.cell:
                by_cell.setdefault(row.cell.name, set()).add(row.paper[: len(published.ACCURACIES)])
    assert all(len(values) == 1 for values in by_cell.values())
    assert len(by_cell) == 40
