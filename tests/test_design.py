"""The design itself: what a Module may be, who may import whom, and what an import loads."""

import ast
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import pytest

import mf_eqx

PACKAGE = Path(mf_eqx.__file__).parent
ROOT = PACKAGE.parent

# Import layers, downward only: a part may import parts of its own layer or of lower ones.
LAYERS = {
    0: [
        *("_custom_types", "_optional", "_leaves", "_files", "_json", "_foreign", "_validate"),
        *("_plain_pickle", "_legacy_torch", "_quiet"),
    ],
    1: ["_batch", "_mean", "_interpolant", "_stable_target", "_times", "_field", "_derivative", "_engine_guards", "nn"],
    2: [
        *("_guidance", "_drawn_guidance", "_label_dropout", "_trained", "_model", "_row", "_weight", "_perceptual"),
        *("_schedule", "_identity"),
    ],
    3: [
        *("_abstract_objective", "_objective", "_sample", "_reward", "_log_density"),
        *("exact", "metrics", "vae"),
    ],
    4: ["_batch_objective", "_ema", "_optimizer", "_sharding", "_fsdp", "_gradient"],
    5: ["_generate", "_train_state", "_train"],
    6: ["checkpoint", "data", "measure", "picture", "released"],
    7: ["run"],
    9: ["__init__"],
}
LAYER = {part: layer for layer, parts in LAYERS.items() for part in parts}
NOT_CODE = {"LICENSE", "py.typed", "__pycache__"}


# Reading the sources


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def file_of(defined):
    """Where a class or function stands, also if a decorator wraps it."""
    return Path(sys.modules[defined.__module__].__file__)


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(), str(path))


def part_of(path):
    """Which entry of `LAYERS` a file of the package belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The absolute dotted names of all modules that a file imports, wherever in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *(node.module.split(".") if node.module else [])]
            # `from .. import x` may name a module or something inside of one: the longer name tells both.
            yield from (".".join([*module, alias.name]) for alias in node.names)


def imported_parts(path):
    names = (name.split(".") for name in imported(path))
    return {name[1] for name in names if name[0] == "mf_eqx" and len(name) > 1 and name[1] in LAYER}


def classes(path):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]


# Modules


def all_modules():
    """Every Module class of the package, private ones too."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "mf_eqx."):
        importlib.import_module(info.name)
    found, left = set(), [eqx.Module]
    while left:
        subclasses = left.pop().__subclasses__()
        found.update(subclasses)
        left.extend(subclasses)
    return sorted(
        (cls for cls in found if cls.__module__.partition(".")[0] == "mf_eqx" and "[" not in cls.__name__),
        key=lambda cls: (cls.__module__, cls.__qualname__),
    )


MODULES = all_modules()
ABSTRACT = [cls for cls in MODULES if cls.__name__.startswith("Abstract")]
FINAL = [cls for cls in MODULES if cls not in ABSTRACT]


def names(cls):
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("mf_eqx.")


def parents(cls):
    """The Modules above `cls`, itself excluded."""
    return [base for base in cls.__mro__[1:] if issubclass(base, eqx.Module) and base is not eqx.Module]


def body(cls):
    """The class statement itself: decorators and metaclasses add nothing here."""
    (node,) = [node for node in classes(file_of(cls)) if node.name == cls.__name__]
    return node


def methods(cls):
    return {node.name: node for node in body(cls).body if isinstance(node, ast.FunctionDef)}


def is_abstract_method(node):
    return any("abstractmethod" in ast.unparse(decorator) for decorator in node.decorator_list)


def fields(cls):
    """Names of the fields that the class statement declares."""
    statements = [node for node in body(cls).body if isinstance(node, ast.AnnAssign)]
    return [node.target.id for node in statements if "ClassVar" not in ast.unparse(node.annotation)]


def test_there_are_modules_of_both_kinds():
    assert len(ABSTRACT) >= 8 and len(FINAL) >= 20


@pytest.mark.parametrize("cls", ABSTRACT, ids=names)
def test_abstract_module_has_an_abstract_method(cls):
    assert any(map(is_abstract_method, methods(cls).values()))


@pytest.mark.parametrize("cls", ABSTRACT, ids=names)
def test_abstract_module_cannot_be_made(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls()


@pytest.mark.parametrize("cls", FINAL, ids=names)
def test_final_module_is_concrete(cls):
    assert not inspect.isabstract(cls)


@pytest.mark.parametrize("cls", FINAL, ids=names)
def test_final_module_has_no_subclass(cls):
    # A subclass made by `Stack[Block]` is a type argument, no new class.
    subclasses = [sub for sub in cls.__subclasses__() if sub in MODULES]
    assert not subclasses


@pytest.mark.parametrize("cls", MODULES, ids=names)
def test_no_concrete_method_is_overridden(cls):
    concrete = {
        name
        for parent in parents(cls)
        if parent in MODULES
        for name, node in methods(parent).items()
        if not is_abstract_method(node)
    }
    assert not concrete & set(methods(cls))


@pytest.mark.parametrize("cls", MODULES, ids=names)
def test_fields_and_init_stand_in_one_class(cls):
    lineage = [cls, *(parent for parent in parents(cls) if parent in MODULES)]
    with_state = [member for member in lineage if fields(member) or "__init__" in methods(member)]
    assert len(with_state) <= 1


@pytest.mark.parametrize("path", sources("mf_eqx"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_method_calls_super(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if ast.unparse(call.func) == "super"]


# Imports


def test_every_file_of_the_package_has_a_layer():
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in NOT_CODE}
    assert found <= set(LAYER)


@pytest.mark.parametrize("path", sources("mf_eqx"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    layer = LAYER[part_of(path)]
    assert not {part for part in imported_parts(path) if LAYER[part] > layer}


def test_imports_within_a_layer_have_no_cycle():
    above = {part: set() for part in LAYER}
    for path in sources("mf_eqx"):
        above[part_of(path)] |= imported_parts(path) - {part_of(path)}
    while ready := [part for part, needs in above.items() if not needs & above.keys()]:
        for part in ready:
            del above[part]
    assert not above


@pytest.mark.parametrize("name", ["from .._train import x", "from ... import _train", "import mf_eqx._train as t"])
def test_imports_are_found_however_they_are_written(name, tmp_path, monkeypatch):
    module = tmp_path / "mf_eqx" / "exact" / ("deep" if "..." in name else "") / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"def f():\n    {name}\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imported_parts(module) == {"_train"}


def test_diffrax_is_imported_for_exact_fields_alone():
    users = [path for path in sources("mf_eqx", "experiments") if any("diffrax" in name for name in imported(path))]
    assert users
    assert all(path.is_relative_to(PACKAGE / "exact") for path in users)


def test_nothing_is_pickled_and_one_file_has_a_reader_of_plain_pickles():
    pickling = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    users = {path for path in sources("mf_eqx") for name in imported(path) if name.partition(".")[0] in pickling}
    assert users == {PACKAGE / "_plain_pickle.py"}
    nodes = [node for node in ast.walk(tree_of(users.pop())) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "pickle"}
    assert used == {"_Unpickler", "PickleError", "SETITEM", "SETITEMS", "BYTEARRAY8", "REDUCE"}


# What is not loaded by importing a part, after those above it.
NOT_LOADED = {
    "mf_eqx": {"diffrax", "grain", "orbax", "matplotlib", "tyro"},
    "mf_eqx.vae": {"safetensors", "huggingface_hub", "torch", "diffusers"},
    "mf_eqx.released": {"msgpack", "flax", "torch", "safetensors", "orbax"},
    "mf_eqx.metrics": {"torch", "safetensors", "scipy.linalg", "diffrax"},
    "mf_eqx.run": {"matplotlib", "tyro", "rich"},
}


def test_importing_a_part_loads_only_what_it_always_needs():
    code = f"import importlib, sys\nfor part, names in {NOT_LOADED}.items():\n"
    code += "    importlib.import_module(part)\n    print(*(f'{part}:{name}' for name in names & {*sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# Size and words


def test_a_method_is_a_file_of_at_most_eighty_lines():
    for path in sources("mf_eqx/_identity"):
        assert len(path.read_text().splitlines()) <= 80, path.name


def public_objects():
    """Public names of the package and of its public parts, with what they stand for: classes and functions alone."""
    public = [part for part in LAYER if not part.startswith("_") and (PACKAGE / part).is_dir()]
    public += [part for part in LAYER if not part.startswith("_") and (PACKAGE / f"{part}.py").is_file()]
    for module in [mf_eqx, *(importlib.import_module(f"mf_eqx.{part}") for part in sorted(public))]:
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith("mf_eqx")
            if not name.startswith("_") and ours and callable(value) and hasattr(value, "__name__"):
                yield f"{module.__name__}.{name}", value


PUBLIC = dict(public_objects())


def test_public_names_are_found():
    assert {"mf_eqx.MeanFlow", "mf_eqx.sample", "mf_eqx.nn.Linear", "mf_eqx.metrics.energy_distance"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    definitions = [
        node
        for node in ast.walk(tree_of(file_of(PUBLIC[name])))
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == PUBLIC[name].__name__
    ]
    assert definitions and all(map(ast.get_docstring, definitions))


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isclass(value)])
def test_public_method_has_a_docstring_of_its_own_or_above(name):
    cls = PUBLIC[name]
    own = {
        method: value for method, value in vars(cls).items() if not method.startswith("_") and method in methods(cls)
    }
    assert all(inspect.getdoc(getattr(cls, method)) for method in own)
