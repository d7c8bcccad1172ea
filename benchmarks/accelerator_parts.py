"""What accelerator.py runs: the parts in order of value, in full for an accelerator and `tiny` for any machine."""

import dataclasses
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FASHION = "/usr/share/datasets/fashion-mnist"
PYTEST = "pytest"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices as a separate process has found them, so that this process never takes their memory."""

    platform: str
    """cpu, gpu, tpu."""
    kind: str
    count: int
    memory: float
    """Bytes of the first device; 0 if it does not say."""
    versions: dict[str, str]

    @property
    def title(self) -> str:
        """Number and kind of the devices. Results that were found on others are not taken for this machine's."""
        return f"{self.count} x {self.kind}"

    @property
    def has_cudnn(self) -> bool:
        return self.platform == "gpu" and "nvidia" in self.kind.lower()


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: a script with its configuration, or pytest with its paths."""

    name: str
    answers: str
    script: str
    config: dict[str, Any]
    """Of the script; `paths` of pytest."""
    seconds: int
    """After which it is stopped."""
    needs: tuple[str, ...] = ("matplotlib",)
    """Packages besides those that the package itself cannot do without."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    lacks: str = ""
    """Why it cannot be run on this machine, if so."""
    processes: int = 1
    """In which pytest runs tests, where pytest-xdist is installed."""

    @property
    def command(self) -> list[str]:
        """Without a shell."""
        if self.script == PYTEST:
            options = ["-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow", "-v", "--tb=short"]
            options.append("--continue-on-collection-errors")
            if self.processes > 1 and find_spec("xdist") is not None:
                options += ["-n", str(self.processes), "--dist", "worksteal"]
            paths = [str(ROOT / path) for path in self.config["paths"]]
            return [sys.executable, "-m", "pytest", "--rootdir", str(ROOT), *options, *paths]
        caller = str(ROOT / "benchmarks" / "call_script.py")
        return [sys.executable, caller, str(ROOT / self.script), json.dumps(self.config)]


def parts(machine: Machine, tiny: bool, data: str) -> list[Part]:
    """All of them, the most valuable first. `data` is the folder of Fashion-MNIST."""
    if not tiny:
        return [part if part.script == PYTEST else _with(part, COMPILED_ONCE) for part in _full(machine, data)]
    if machine.platform == "cpu":  # nothing is learnt from what the compiler makes of it
        return [_with(part, {"XLA_FLAGS": "--xla_backend_optimization_level=0"}) for part in _tiny(data)]
    return _tiny(data)


def _with(part: Part, environment: dict[str, str]) -> Part:
    return dataclasses.replace(part, environment={**environment, **part.environment})


def _remat(machine: Machine) -> str:
    """How much of a step of XL/2 with 256 rows is computed again: as little as memory clearly allows."""
    return "none" if machine.memory > ENOUGH else "products" if machine.memory > 70e9 else "full"


def _benchmark(name: str) -> str:
    return f"benchmarks/{name}.py"


CHECKS = (
    "tests/test_on_device.py",
    "tests/test_train.py::test_every_buffer_of_the_old_state_is_donated",
    "tests/model/test_unet.py::test_scanned_and_unrolled_give_the_same",
    "tests/nn/test_attention.py",
    "tests/nn/test_chunked_attention.py",
    "tests/nn/test_pallas_attention.py",
)
TESTS = {
    "layers": ("nn",),
    "steps": ("test_train.py", "test_sharding.py"),
    "objectives": ("test_objective.py",),
    "derivatives": ("test_derivative.py",),
    "every method": ("identity/test_base.py", "identity/test_facts.py"),
    "single methods": tuple(
        f"identity/{path.name}"
        for path in sorted((ROOT / "tests" / "identity").glob("test_*.py"))
        if path.stem not in ("test_base", "test_facts")
    ),
}
"""The usual tests in parts that can end within their limits."""
ENOUGH = 170e9
"""Bytes of memory that are certainly enough for a step of XL/2 without remat, whose activations alone take about
100e9."""
EXACT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
"""Products of float32 in float32, which tests expect."""
SHARED = {**EXACT, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The same, for several processes on one device."""
COMPILED_ONCE = {"JAX_COMPILATION_CACHE_DIR": "../../programs", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "2"}
"""A program that several parts run is compiled by the first of them; a part runs in DIRECTORY/parts/NAME."""
TESTERS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""Processes of tests, most of whose time is compiling."""
TRAINING = ("matplotlib", "grain", "beartype", "sklearn", "safetensors")
"""Packages that the trainings need."""
ORDER = (
    "machine",
    "checks",
    "steps XL/2",
    "steps B/4",
    "steps B/4, unrolled",
    "profile",
    "digits",
    "steps B/2",
    "steps B/2, Pallas",
    "steps B/2, chunked",
    "forms B/4",
    "steps XL/2, XLA's attention",
    "images",
    "sampling",
    "steps XL/2, no remat",
    "steps XL/2, every row",
    "compile",
    "accuracy",
    "accuracy, full",
    "steps U-Net",
    "steps U-Net, bfloat16",
    "forms XL/2",
    "forms U-Net",
    "sampling, cuDNN",
    "devices",
    *(f"tests of {name}" for name in TESTS),
)
"""The parts, the most valuable first."""


def _full(machine: Machine, data: str) -> list[Part]:
    parts = [*_checks(), *_steps(machine), *_forms(machine), *_trainings(data), *_measurements(machine)]
    return sorted(parts, key=lambda part: ORDER.index(part.name))


def _kernels(machine: Machine) -> list[str]:
    """Attention in training, the faster one first."""
    return ["cudnn", "xla"] if machine.has_cudnn else ["xla"]


def _without_cudnn(machine: Machine) -> str:
    return "" if machine.has_cudnn else "cuDNN's attention needs an NVIDIA GPU"


def _checks() -> list[Part]:
    tests = {"environment": SHARED, "processes": TESTERS}
    question, needs = "Do the usual tests pass with exact products?", ("pytest", "hypothesis")
    usual = [
        Part(f"tests of {name}", question, PYTEST, {"paths": [f"tests/{file}" for file in files]}, 400, needs, **tests)
        for name, files in TESTS.items()
    ]
    return [Part("checks", "Is it right here?", PYTEST, {"paths": CHECKS}, 300, ("pytest",), **tests), *usual]


def _steps(machine: Machine) -> list[Part]:
    """Whole steps of training."""
    kernels = _kernels(machine)
    common = {"batch": [256], "dtype": ["bfloat16"], "form": ["scan"], "count": False, "rounds": 15}
    common["variant"] = ["MeanFlow on every row", "MeanFlow", "guided"]
    b4, b2 = {**common, "model": ["B/4"]}, {**common, "model": ["B/2"]}
    xl = {**common, "model": ["XL/2"], "attention": kernels[:1], "remat": [_remat(machine)]}
    xl["variant"] = ["MeanFlow", "guided"]
    unrolled = {**b4, "attention": kernels[:1], "form": ["unroll"], "variant": ["MeanFlow", "guided"]}
    # In a loop the U-Net needs twice the memory (`compile_for.py`).
    unet = {**common, "model": ["U-Net"], "batch": [512], "form": ["default"], "share": [0.75], "rounds": 7}
    unet["variant"] = ["MeanFlow"]
    no_triton = "" if machine.has_cudnn else "attention in Pallas needs an NVIDIA GPU"
    plenty = "" if 110e9 < machine.memory <= ENOUGH else "other parts run XL/2 without remat, or memory is too small"

    def part(name: str, question: str, config: dict[str, Any], seconds: int, lacks: str = "") -> Part:
        return Part(f"steps {name}", question, _benchmark("jvp_overhead"), config, seconds, lacks=lacks)

    cost, speed = "What does the JVP cost?", "How fast is the CIFAR-10 U-Net?"
    saving, blocks = "What does cuDNN's attention save?", "What does attention over blocks of keys cost?"
    return [
        part("XL/2", cost, xl, 330),
        part("B/4", cost, {**b4, "attention": kernels}, 240),
        part("B/4, unrolled", "What does the JVP cost without a loop?", unrolled, 420),
        part("B/2", cost, {**b2, "attention": kernels}, 300),
        part("B/2, Pallas", "What does attention in Pallas save?", {**b2, "attention": ["pallas"]}, 240, no_triton),
        part("B/2, chunked", blocks, {**b2, "attention": ["chunked"]}, 240),
        part("XL/2, XLA's attention", saving, {**xl, "attention": ["xla"]}, 330, _without_cudnn(machine)),
        part("XL/2, no remat", "What does remat cost?", {**xl, "remat": ["none"]}, 330, plenty),
        part("XL/2, every row", "What does the split save?", {**xl, "variant": ["MeanFlow on every row"]}, 240),
        part("U-Net", speed, {**unet, "dtype": ["float32"]}, 400),
        part("U-Net, bfloat16", speed, unet, 400),
    ]


def _forms(machine: Machine) -> list[Part]:
    """Loops over blocks, and where the time of a step goes."""
    one = {"batch": 256, "dtype": "bfloat16", "attention": _kernels(machine)[0]}
    large = {**one, "model": "XL/2", "remat": _remat(machine)}
    unet = {**one, "model": "U-Net", "batch": 512, "attention": "xla"}
    both = {**large, "form": ["loop", "unrolled"], "variant": "MeanFlow"}
    forms, loops = _benchmark("step_forms"), "Does a loop over blocks cost time?"
    return [
        Part("profile", "Where do the milliseconds go?", _benchmark("step_profile"), large, 180, ()),
        Part("forms B/4", loops, forms, {**one, "model": "B/4"}, 300, ()),
        Part("forms XL/2", loops, forms, both, 500, ()),
        Part("forms U-Net", "Does unrolling help the U-Net?", forms, unet, 300, ()),
    ]


def _trainings(data: str) -> list[Part]:
    images = {"preset": "gpu", "data": [data], "name": "images"}
    question = "Does it learn images?"
    return [
        Part("digits", "Does it learn here?", "experiments/digits.py", {"name": "digits"}, 180, TRAINING),
        Part("images", question, "experiments/fashion.py", images, 420, TRAINING, lacks=_lacks(data)),
    ]


def _measurements(machine: Machine) -> list[Part]:
    rates = {"model": ["B/4", "XL/2"], "batch": [1, 256, 1024], "dtype": "bfloat16"}
    with_cudnn, sampling = {**rates, "attention": "cudnn"}, _benchmark("sampling_throughput")
    compiled = {"batch": 256, "dtype": "bfloat16", "form": ["scan"], "repeats": 1, "warm": True}
    spread = {"real": True, "devices": [1, machine.count], "model": "B/4", "batch": 64 * machine.count}
    alone, exact = "" if machine.count > 1 else "there is one device", "How exact with exact products?"
    first, accuracy = "How long until the first step, cold and warm?", _benchmark("jvp_accuracy")
    return [
        Part("machine", "What do products and copies reach?", _benchmark("device_peaks"), {}, 120, ()),
        Part("sampling", "How fast does it generate?", sampling, rates, 240),
        Part("sampling, cuDNN", "How fast with cuDNN?", sampling, with_cudnn, 240, lacks=_without_cudnn(machine)),
        Part("compile", first, _benchmark("compile_time"), {**compiled, "variant": ["MeanFlow"]}, 240),
        Part("accuracy", "How exact is du/dt?", accuracy, {}, 120),
        Part("accuracy, full", exact, accuracy, {}, 120, environment=EXACT),
        Part("devices", "What does spreading a step cost?", _benchmark("device_scaling"), spread, 240, (), lacks=alone),
    ]


def _tiny(data: str) -> list[Part]:
    step = {"model": ["MLP"], "batch": [4], "variant": ["MeanFlow"], "count": False, "rounds": 1}
    peaks = {"size": 256, "megabytes": 1, "rounds": 2}
    forms = {"model": "tiny", "batch": 4, "rounds": 1, "form": ["loop", "plain"]}
    made = {"model": ["tiny"], "form": ["scan"], "variant": ["MeanFlow"], "batch": 4, "repeats": 1, "warm": True}
    images = {"preset": "quick", "data": [data], "test_run": True}
    rates = {"model": ["MLP"], "batch": [1, 4], "rounds": 1}
    spread = {"devices": [1], "batch": 4, "rounds": 1, "real": True}
    profiled = {"model": "MLP", "batch": 4, "steps": 1}
    jvp, forming, sampling = map(_benchmark, ("jvp_overhead", "step_forms", "sampling_throughput"))
    compiling, accuracy, spreading = map(_benchmark, ("compile_time", "jvp_accuracy", "device_scaling"))
    return [
        Part("machine", "What do products and copies reach?", _benchmark("device_peaks"), peaks, 120, ()),
        Part("checks", "Is it right here?", PYTEST, {"paths": CHECKS[:1]}, 300, ("pytest",)),
        Part("steps", "What does the JVP cost?", jvp, step, 300),
        Part("profile", "Where do the milliseconds go?", _benchmark("step_profile"), profiled, 300, ()),
        Part("digits", "Does it learn here?", "experiments/digits.py", {"test_run": True}, 300, TRAINING),
        Part("forms", "Does a loop over blocks cost time?", forming, forms, 300, ()),
        Part("images", "Does it learn images?", "experiments/fashion.py", images, 300, TRAINING, lacks=_lacks(data)),
        Part("sampling", "How fast does it generate?", sampling, rates, 300),
        Part("compile", "How long until the first step, cold and warm?", compiling, made, 300),
        Part("accuracy", "How exact is du/dt?", accuracy, {"model": "tiny", "rows": 2, "steps": [5e-3]}, 300),
        Part("devices", "What does spreading a step cost?", spreading, spread, 300, ()),
    ]


def _lacks(data: str) -> str:
    return "" if Path(data).is_dir() else f"{data} is missing: give the folder of Fashion-MNIST as --data"
