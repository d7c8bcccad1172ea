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


def _full(machine: Machine, data: str) -> list[Part]:
    no_cudnn = "" if machine.has_cudnn else "cuDNN's attention needs an NVIDIA GPU"
    kernels = ["cudnn", "xla"] if machine.has_cudnn else ["xla"]
    step = {"batch": [256], "dtype": ["bfloat16"], "form": ["scan"], "count": False, "rounds": 15}
    step["variant"] = ["MeanFlow on every row", "MeanFlow", "guided"]
    one = {"batch": 256, "dtype": "bfloat16", "attention": kernels[0]}
    xl = {**step, "model": ["XL/2"], "attention": kernels[:1], "remat": [_remat(machine)]}
    xl["variant"] = ["MeanFlow", "guided"]
    large, unets = {**one, "model": "XL/2", "remat": _remat(machine)}, {**one, "attention": "xla"}
    jvp, forms, sampling = map(_benchmark, ("jvp_overhead", "step_forms", "sampling_throughput"))
    rates = {"model": ["B/4", "XL/2"], "batch": [1, 256, 1024], "dtype": "bfloat16"}
    unet = {**step, "model": ["U-Net"], "batch": [512, 1024], "share": [0.75], "variant": ["MeanFlow"], "rounds": 7}
    plenty = "" if 110e9 < machine.memory <= ENOUGH else "other parts run XL/2 without remat, or memory is too small"
    spread = {"real": True, "devices": [1, machine.count], "model": "B/4", "batch": 64 * machine.count}
    return [
        Part("machine", "What do products and copies reach?", _benchmark("device_peaks"), {}, 120, ()),
        Part("checks", "Is it right here?", PYTEST, {"paths": CHECKS}, 300, ("pytest",), SHARED, processes=TESTERS),
        Part("steps XL/2", "What does the JVP cost?", jvp, xl, 330),
        Part("steps B/4", "What does the JVP cost?", jvp, {**step, "model": ["B/4"], "attention": kernels}, 240),
        Part(
            "steps B/4, unrolled",
            "What does the JVP cost without a loop?",
            jvp,
            {**step, "model": ["B/4"], "attention": kernels[:1], "form": ["unroll"], "variant": ["MeanFlow", "guided"]},
            420,
        ),
        Part("profile", "Where do the milliseconds go?", _benchmark("step_profile"), large, 180, ()),
        Part("digits", "Does it learn here?", "experiments/digits.py", {"name": "digits"}, 180, TRAINING),
        Part(
            "steps B/2",
            "What does the JVP cost?",
            jvp,
            {**step, "model": ["B/2"], "attention": kernels},
            300,
        ),
        Part(
            "steps B/2, Pallas",
            "What does attention in Pallas save?",
            jvp,
            {**step, "model": ["B/2"], "attention": ["pallas"]},
            240,
            lacks="" if machine.has_cudnn else "attention in Pallas needs an NVIDIA GPU",
        ),
        Part(
            "steps B/2, chunked",
            "What does attention over blocks of keys cost?",
            jvp,
            {**step, "model": ["B/2"], "attention": ["chunked"]},
            240,
        ),
        Part("forms B/4", "Does a loop over blocks cost time?", forms, {**one, "model": "B/4"}, 300, ()),
        Part(
            "steps XL/2, XLA's attention",
            "What does cuDNN's attention save?",
            jvp,
            {**xl, "attention": ["xla"]},
            330,
            lacks=no_cudnn,
        ),
        Part(
            "images",
            "Does it learn images?",
            "experiments/fashion.py",
            {"preset": "gpu", "data": [data], "name": "images"},
            420,
            TRAINING,
            lacks=_lacks(data),
        ),
        Part("sampling", "How fast does it generate?", sampling, rates, 240),
        Part("steps XL/2, no remat", "What does remat cost?", jvp, {**xl, "remat": ["none"]}, 330, lacks=plenty),
        Part(
            "steps XL/2, every row", "What does the split save?", jvp, {**xl, "variant": ["MeanFlow on every row"]}, 240
        ),
        Part(
            "compile",
            "How long until the first step, cold and warm?",
            _benchmark("compile_time"),
            {"batch": 256, "dtype": "bfloat16", "form": ["scan"], "variant": ["MeanFlow"], "repeats": 1, "warm": True},
            240,
        ),
        Part("accuracy", "How exact is du/dt?", _benchmark("jvp_accuracy"), {}, 120),
        Part(
            "accuracy, full", "How exact with exact products?", _benchmark("jvp_accuracy"), {}, 120, environment=EXACT
        ),
        Part("steps U-Net", "How fast is the CIFAR-10 U-Net?", jvp, {**unet, "dtype": ["float32"]}, 300),
        Part("steps U-Net, bfloat16", "How fast is the CIFAR-10 U-Net?", jvp, unet, 300),
        Part(
            "forms XL/2",
            "Does a loop over blocks cost time?",
            forms,
            {**large, "form": ["loop", "unrolled"], "variant": "MeanFlow"},
            500,
            (),
        ),
        Part(
            "forms U-Net", "Does unrolling help the U-Net?", forms, {**unets, "model": "U-Net", "batch": 512}, 300, ()
        ),
        Part("sampling, cuDNN", "How fast with cuDNN?", sampling, {**rates, "attention": "cudnn"}, 240, lacks=no_cudnn),
        Part(
            "devices",
            "What does spreading a step cost?",
            _benchmark("device_scaling"),
            spread,
            240,
            (),
            lacks="" if machine.count > 1 else "there is one device",
        ),
        *(
            Part(
                f"tests of {name}",
                "Do the usual tests pass with exact products?",
                PYTEST,
                {"paths": [f"tests/{file}" for file in files]},
                400,
                ("pytest", "hypothesis"),
                SHARED,
                processes=TESTERS,
            )
            for name, files in TESTS.items()
        ),
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
