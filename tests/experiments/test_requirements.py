"""What all scripts have in common: packages that they need at their end are asked for at their start, and recipes take
--start."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [path for folder in ("experiments", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
NEEDED = {
    "matplotlib": r"picture\.save_|matplotlib|toy_report\.",
    "safetensors": r"checkpoint\.save_weights\(",
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


@pytest.mark.parametrize(
    "path",
    [path for path in SCRIPTS if re.search(r"^class Config\(\w+\.Settings\)", path.read_text(), re.MULTILINE)],
    ids=lambda p: p.stem,
)
def test_every_recipe_that_trains_one_network_may_start_from_another_run(path):
    text = path.read_text()
    assert '    start: str = ""\n' in text
    assert re.search(r'start=config\.start|"start": config\.start', text)
