"""What every run needs, once: a command line, a directory, a progress line, tables and pictures.

    config flags -> main -> your function -> RunDirectory   config.json, metrics.jsonl, any other file
                                          -> Ledger         results of finished cells
                                          -> Progress       one line on stderr
                                          -> in_parallel    many small trainings, one per thread
                                          -> table          final results as text
                                          -> save_image_grid, save_curves, save_point_grid, save_flows, save_heat_maps
                                          -> compile_program, time_interleaved   what it costs

A script is one function of one frozen dataclass; `main` does the rest, and ends bad input in one line:

    from mf_eqx import run

    def train(config: Config) -> None:
        directory = run.RunDirectory.create(config)
        with run.Progress(config.steps) as progress:
            for step in range(1, config.steps + 1):
                state, metrics = train_step(state, next(batches))
                progress.update(step, metrics)
                if step % 50 == 0:
                    directory.log(step, metrics)

    if __name__ == "__main__":
        run.main(train, {"plain": ("no guidance", Config()), "guided": ("scale 2", Config(scale=2.0))})

Imported explicitly (`from mf_eqx import run`). The command line needs tyro and the pictures matplotlib, both in the
extra `experiments`; they are loaded where they are used, and their absence says what to install.
"""

from .._optional import MissingDependency as MissingDependency, optional as optional
from ._cli import main as main
from ._curves import save_curves as save_curves
from ._directory import RunDirectory as RunDirectory
from ._ledger import Ledger as Ledger
from ._parallel import in_parallel as in_parallel, scan_in_chunks as scan_in_chunks
from ._picture import save_image_grid as save_image_grid
from ._plane import (
    Flow as Flow,
    save_flows as save_flows,
    save_heat_maps as save_heat_maps,
    save_point_grid as save_point_grid,
)
from ._program import (
    compile_program as compile_program,
    Cost as Cost,
    product_flops as product_flops,
    Program as Program,
)
from ._progress import Progress as Progress
from ._table import table as table
from ._timing import matmul_peak as matmul_peak, time_interleaved as time_interleaved, Times as Times
from ._values import fetch as fetch
