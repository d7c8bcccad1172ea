"""What every run needs, once: a command line, a directory, a progress line, tables and pictures.

    config flags -> main -> your function -> opened, RunDirectory   config.json, metrics.jsonl, any other file
                                          -> train          the loop: resumes, logs, saves, previews
                                          -> train_cells    many small trainings, one per thread, the same
                                          -> Ledger         results of finished cells
                                          -> Progress       one line on stderr
                                          -> in_parallel    many small tasks of any kind
                                          -> table          final results as text
                                          -> save_image_grid, save_curves, save_trends, save_point_grid,
                                             save_flows, save_heat_maps
                                          -> compile_program, time_interleaved   what it costs

A script is one function of one frozen dataclass; `main` does the rest, and ends bad input in one line. A script that
trains one network for long extends `Settings`, and can be killed at any moment:

    from mf_eqx import data, run

    @dataclasses.dataclass(frozen=True)
    class Config(run.Settings):
        steps: int = 6000

    def main(config: Config) -> None:
        parallelism = run.parallelism(config)
        step = mfx.TrainStep(objective, optimizer, accumulation=config.accumulation, parallelism=parallelism)
        stream = data.Stream(source, batch=64, parallelism=parallelism)
        with run.opened(config) as directory:
            state = run.train(config, step, make_state, stream, directory, steps=config.steps)

    if __name__ == "__main__":
        run.main(main, Config())

One that trains many small networks side by side extends `CellSettings` and calls `train_cells`: the same promises.

Imported explicitly (`from mf_eqx import run`). The command line needs tyro and the pictures matplotlib, both in the
extra `experiments`; they are loaded where they are used, and their absence says what to install.
"""

from .._files import sha256_of_file as sha256_of_file
from .._json import read_json_object as read_json_object
from .._optional import MissingDependency as MissingDependency, optional as optional
from ._cells import announce as announce, train_cells as train_cells, Training as Training
from ._cli import main as main
from ._curves import save_curves as save_curves
from ._directory import RunDirectory as RunDirectory
from ._ledger import Ledger as Ledger
from ._lock import InUse as InUse, locked as locked, Moved as Moved
from ._loggers import Logger as Logger, TensorBoardLogger as TensorBoardLogger, WandbLogger as WandbLogger
from ._open import opened as opened
from ._parallel import in_parallel as in_parallel
from ._picture import save_image_grid as save_image_grid
from ._plane import (
    Flow as Flow,
    flow_of as flow_of,
    save_flows as save_flows,
    save_heat_maps as save_heat_maps,
    save_point_grid as save_point_grid,
)
from ._processes import is_first as is_first, local as local, Stopped as Stopped, tell as tell
from ._program import (
    compile_program as compile_program,
    Cost as Cost,
    product_flops as product_flops,
    Program as Program,
)
from ._progress import Progress as Progress, Work as Work
from ._settings import (
    CellSettings as CellSettings,
    check_sizes as check_sizes,
    digest as digest,
    parallelism as parallelism,
    setting as setting,
    Settings as Settings,
)
from ._table import table as table
from ._timing import matmul_peak as matmul_peak, time_interleaved as time_interleaved, Times as Times
from ._train import NonFinite as NonFinite, train as train
from ._trends import save_trends as save_trends, Series as Series
from ._values import fetch as fetch
