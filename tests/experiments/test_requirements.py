"""What all scripts have in common: packages that they need at their end are asked for at their start, and recipes take
--start."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [path for folder in ("experiments", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
NEEDED = {
    "matplotlib": r"picture\.save_|matplotlib|toy_report\.",
    "safetensors": r"checkpoint\.save_weights\(",
    "sklearn": r"image_judge\.",
    "flatbuffers": r"checkpoint\.export_sampler\(",
}
BEGINS = r"run\.opened\(|RunDirectory\.create\(|checkpoint\.save_weights\("


def main_of(path):
    """The function of a script, and all else in it; none for a file that others import."""
    text = path.read_text()
    found = re.search(r"^def main\(.*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    return found and found[0], text


@pytest.mark.parametrize("path", [path for path in SCRIPTS if main_of(path)[0]], ids=lambda path: path.stem)
def test_packages_that_a_script_needs_at_its_end_are_asked_for_at_its_start(path):
    main, text = main_of(path)
    needed = {name for name, use in NEEDED.items() if re.search(use, text)}
    before = re.split(BEGINS, main)[0]
    asked = {name for call in re.findall(r"run\.require\((.*?)\)", before) for name in re.findall(r'"(\w+)"', call)}
    assert needed <= asked


def trains_one_network(path):
    """Whether it does so in any case, and not in place of weights that it may be given."""
    text = path.read_text()
    return re.search(r"^class Config\(\w+\.Settings\)", text, re.MULTILINE) and '    weights: str = ""\n' not in text


@pytest.mark.parametrize("path", [*filter(trains_one_network, SCRIPTS)], ids=lambda p: p.stem)
def test_every_recipe_that_trains_one_network_may_start_from_another_run(path):
    text = path.read_text()
    assert '    start: str = ""\n' in text
    assert re.search(r'start=config\.start|"start": config\.start', text)


def imported_with(path):
    """The names of all that is imported with a script: by its own lines and by those of the files beside it, but for
    what their functions import when they are called."""
    statements, found = [ast.parse(path.read_text())], set()
    while statements:
        for statement in statements.pop().body:
            if isinstance(statement, ast.With):
                statements.append(statement)
            names = [each.name for each in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - found:
                found.add(name)
                if (beside := path.with_name(f"{name}.py")).exists():
                    statements.append(ast.parse(beside.read_text()))
    return found


@pytest.mark.parametrize("name", ["imagenet_latents", "prepare_latents", "generate", "evaluate"])
def test_scikit_learn_is_not_imported_by_what_may_judge_nothing(name):
    found = imported_with(ROOT / "experiments" / f"{name}.py")
    assert "prepare_latents" in found | {name} and "numpy" in found and "sklearn" not in found
