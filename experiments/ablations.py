"""The ablations of the MeanFlow paper (Tab. 1a to 1f and Tab. 5) on small data sets, with the paper's FIDs beside them.

    python experiments/ablations.py                      all tables on eight Gaussians
    python experiments/ablations.py --only 1a 1b         two of them
    python experiments/ablations.py --data digits --only 1a
    python experiments/ablations.py --data fashion --only 1a 1b 1e 1f 5
    python experiments/ablations.py --method Shortcut    the tables that another method has

A cell is one training from one seed. Results of finished cells are in runs/ablations/DATA/cells.jsonl (of methods other
than MeanFlow in runs/ablations/DATA_METHOD), and a cell that is there is not trained again: tables share cells, and a
larger --seeds trains the new seeds only. A run that was stopped, or killed, continues by the same command.

What can agree with the paper is the order of rows. Its FIDs are of ImageNet after 400,000 steps of batch 256, with
p = 1, lognorm(-0.4, 1.0), Adam's betas (0.9, 0.95), a constant rate of 1e-4 and an average of decay 0.9999. Here
Fashion-MNIST has the same p and times, points and digits have p = 0 and uniform times. Networks are smaller,
steps far fewer, the batch is 64 on digits and 16 on Fashion-MNIST, Adam's betas are (0.9, 0.999), the rate warms up and
decays, and the average is shorter. With another --method, too, the FIDs are those of MeanFlow.

On points and digits gradients are clipped to norm 1: with p = 0 the pull of a row has no bound, and without clipping
single steps ruined trainings with a large p or kappa. On Fashion-MNIST they are not clipped, since the paper mentions
no clipping. A cell with ten steps in a row whose loss or gradient is not finite is recorded as diverged, and the others
go on.

How to read the tables: guidance moves samples away from the data, so in Tab. 1f and 5 of points look at the distance to
the guided truth. A share of 0 is Flow Matching, which never trains u(z, 0, 1), but is judged there like all others;
toy_2d.py samples it as it is meant to be sampled. The row `real data` compares real images with each other: for
Fashion-MNIST as many training images with the test images, for digits one random half of the data with the other. Its
share of classes that are read correctly is that of real images on which the classifier was not trained. RESULTS.md has
the tables that were run, and which orders agree.
"""

import dataclasses
import functools
import time

import fashion
import toy_2d
from ablation_cells import cells_of, key_of, method_key, refused, Study, tables, train_missing
from ablation_images import fashion_mnist
from ablation_recipes import eight_gaussians, handwritten_digits, Recipe
from ablation_report import report, save_figure, save_pictures
from ablation_tables import CENTRES, paper_tables, Setting
from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    from mf_eqx import run

NAMES = tuple(paper_tables(Setting()))
"""The names of all tables."""


@dataclasses.dataclass(frozen=True)
class Config(Study):
    """A run of ablations."""

    files: str = fashion.PLACE
    """With --data fashion: the folder with the four IDX files."""
    only: tuple[str, ...] | None = None
    """Tables: 1a (share), 1b (tangent), 1c (embedding), 1d (times), 1e (p), 1f (omega), 5 (kappa); by default all that
    the method has. Only MeanFlow has 1b. Methods that learn from pairs of data and noise have neither 1f nor 5. Methods
    that need rows with r = t (see the README's table of methods) have no row 100% in 1a. If a method has a loss of its
    own, 1e changes the weight of rows with r = t only."""
    steps: int | None = None
    """Training steps of a cell, by default 4000 for eight_gaussians and for fashion, 1500 for digits."""
    save_every: int = 200
    """Steps between checkpoints of a cell; its last step is always saved."""
    log_every: int = 100
    """Steps between lines of each cell's metrics.jsonl, or slightly fewer, to make the parts equal; each line is the
    mean over these steps. A cell can be stopped after each line."""
    most_faults: int = 10**6
    """Steps in a row without a finite loss and gradient after which the whole run stops, by default never: such steps
    leave the state unchanged, and a cell with ten of them in a row is recorded as diverged."""
    name: str = ""
    """Directory below runs/ablations for cells, tables and pictures, by default named after data set and method."""

    def __post_init__(self):
        self.check(seeds=1)
        run.check_sizes(self, seeds=100)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        run.check_among(self, method=toy_2d.identities(self.identity, 1), only=NAMES)
        if not tables(self):
            raise ValueError(f"method must be one that has a table, got {self.method}, which has none")
        if self.files != fashion.PLACE and self.data != "fashion":
            raise ValueError(f"files must be left out with --data {self.data}, got {self.files}")
        for name in self.only or ():
            if name not in tables(self):
                reason = next(iter(refused(self, name).values()))
                raise ValueError(f"only must be among the tables of {self.method}, got {name}: {reason}")


def make_recipe(config: Config) -> Recipe:
    steps = 2 if config.test_run else config.steps
    given = {} if steps is None else {"steps": steps}
    if config.data == "eight_gaussians":
        return eight_gaussians(**given)
    if config.data == "digits":
        return handwritten_digits(**given)
    given |= {"judged": 100, "classifier_steps": 2} if config.test_run else {}
    return fashion_mnist(files=config.files, **given)


def main(config: Config) -> None:
    """Train the cells that are missing, then write tables and pictures."""
    run.require("matplotlib")
    recipe = make_recipe(config)
    shared = f"{config.data}_{config.method}" if method_key(config) else config.data
    with run.opened(config, shared=shared) as directory:
        run_cells(config, recipe, directory)


def run_cells(config: Config, recipe: Recipe, directory: run.RunDirectory) -> None:
    """Train the missing cells of the tables asked for, print these, and write all tables that are complete."""
    ledger, key = run.Ledger(directory.root / "cells.jsonl"), functools.partial(key_of, config, recipe)
    names = tuple(tables(config)) if config.only is None else config.only
    wanted = dict.fromkeys(cell for name in names for cell in cells_of(config, name))
    # By seed, not by setting: two seeds of one setting side by side would both compile its program.
    missing = sorted((cell for cell in wanted if key(cell) not in ledger), key=lambda cell: cell.seed)
    seconds = {cell: recipe.seconds(cell.setting, CENTRES[config.data]) for cell in missing}
    kept = f"{len(wanted) - len(missing)} of them finished before ({directory.root})"
    time_needed = f"; the others take about {sum(seconds.values()) / 60:.0f} min of CPU time" if missing else ""
    print(f"{len(wanted)} cells of {recipe.numbers.steps} steps, {kept}{time_needed}", flush=True)
    train_missing(config, recipe, directory, ledger, seconds)
    # Files have all tables that are complete, also those of earlier runs.
    complete = [name for name in tables(config) if all(key(cell) in ledger for cell in cells_of(config, name))]
    everything = report(config, recipe, ledger, complete)
    run.write_whole(directory.path("results.md"), (everything + "\n").encode())
    save_figure(directory.path("ablations.png"), config, recipe, ledger, complete)
    pictures = ["ablations.png", *save_pictures(config, recipe, directory, complete)]
    text, wall = report(config, recipe, ledger, names), time.perf_counter() - directory.opened
    print(f"{text}\n\n{wall:.0f} seconds. results.md, {', '.join(pictures)} are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
