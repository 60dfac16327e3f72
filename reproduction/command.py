"""The command behind paper.py."""

from __future__ import annotations

import pathlib

from lipjax.errors import InputError
from lipjax.experiments.commands import Parser
from reproduction import published, tables


def paper(parser: Parser, arguments: list[str]) -> None:
    """``paper.py``."""
    parser.add_argument("what", choices=(*published.TABLES, *published.FIGURES), help="table or figure of the paper")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the runs and of what is written")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the epochs, at most 1; default: 1")
    parser.add_argument("--seeds", type=int, help="runs per cell; default: 1, and 3 for table4")
    parser.add_argument("--limit", type=int, help="test images that are certified; default: all")
    parser.add_argument(
        "--only", default="*", help="pattern of cells to run, such as 'mnist_4c3f-*', '' for none; default: all"
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="override an entry of every config")
    options, overrides = parser.parse_known_args(arguments)
    for name, value in (("--scale", options.scale), ("--seeds", options.seeds), ("--limit", options.limit)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name}={value} cannot be used; give a finite number more than 0")
    if options.scale > 1:
        raise InputError(f"--scale={options.scale} cannot be used; give a fraction of the configs' epochs, at most 1")
    make = tables.table if options.what in published.TABLES else tables.figure
    path = make(
        options.what,
        tables.Options(
            options.workdir,
            pathlib.Path("configs"),
            scale=options.scale,
            seeds=options.seeds,
            limit=options.limit,
            only=options.only,
            overrides=tuple(overrides),
        ),
    )
    print(f"\n{path.read_text() if path.suffix == '.md' else ''}\n{options.what}: {path}")
