"""The parts that every run needs: a command line, a directory, the training loop, a progress line, tables.

    config flags -> main -> your function -> opened, RunDirectory   config.json, metrics.jsonl, any other file
                                          -> train          the loop: resumes, logs, saves, previews
                                          -> train_cells    the same for many small trainings, one per thread
                                          -> Ledger         results of finished cells
                                          -> Progress       one line on stderr
                                          -> in_parallel    many small tasks of any kind
                                          -> own_network    a class from a file of a user's own; also own_identity
                                          -> table          final results as text

A script is one function of one frozen dataclass; `main` does the rest, and reports bad input in one line. A script
that trains one network for a long time extends `Settings`, and can be killed at any moment:

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

A script that trains many small networks side by side extends `CellSettings` and calls `train_cells`, with the same
guarantees.

This module is imported explicitly (`from mf_eqx import run`). Plots are in `mf_eqx.picture`, costs of programs in
`mf_eqx.measure`. The command line needs tyro (extra `experiments`), which is imported only where it is used; if it is
missing, the error says what to install.
"""

from .._files import (
    check_writable as check_writable,
    save_array as save_array,
    sha256_of_file as sha256_of_file,
    whole_file as whole_file,
    write_whole as write_whole,
)
from .._json import read_json_object as read_json_object
from .._optional import MissingDependency as MissingDependency, optional as optional, require as require
from ._cell_training import Training as Training
from ._cells import announce as announce, train_cells as train_cells
from ._cli import main as main
from ._directory import RunDirectory as RunDirectory
from ._ledger import Ledger as Ledger
from ._lock import InUse as InUse, locked as locked, Moved as Moved
from ._loggers import Logger as Logger, TensorBoardLogger as TensorBoardLogger, WandbLogger as WandbLogger
from ._open import opened as opened
from ._own import (
    own_class as own_class,
    own_file as own_file,
    own_identity as own_identity,
    own_network as own_network,
    OwnFile as OwnFile,
)
from ._parallel import in_parallel as in_parallel
from ._processes import is_first as is_first, local as local, once as once, Stopped as Stopped, tell as tell
from ._progress import Progress as Progress, Work as Work
from ._settings import (
    CellSettings as CellSettings,
    check_among as check_among,
    check_sizes as check_sizes,
    digest as digest,
    parallelism as parallelism,
    setting as setting,
    Settings as Settings,
)
from ._table import table as table
from ._train import NonFinite as NonFinite, train as train
from ._values import fetch as fetch
