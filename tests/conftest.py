"""What all tests share: quick compiling, memory, runtime type checking of the package, and float64 where a test asks
for it."""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import inspect
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

import equinox as eqx
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Before anything imports mf_eqx. Off with JAXTYPING_DISABLE=1, or where beartype is not installed.
if importlib.util.find_spec("beartype") is not None:
    install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# XLA compiles in half the time if it does not optimise, does not cut a program into parts for several cores, and
# leaves single operations outside the slow compiler of fusions, or (the last flag, up to JAX 0.10) does without that
# compiler. An XLA that does not know a flag ends the process.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_disable_hlo_passes=fusion-wrapper",
    "--xla_cpu_use_fusion_emitters=false",
)
# Programs that one process of this run has compiled, for all, and for when they were dropped from memory. JAX does not
# write such a file at once: a process that reads a part of one compiles the program itself.
if "PYTEST_XDIST_WORKER" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory()
    os.environ["TESTED_PROGRAMS"] = PROGRAMS.name
jax.config.update("jax_compilation_cache_dir", os.environ["TESTED_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Python's default looks for garbage so often that this takes a twentieth of the time, and it saves no memory.
gc.set_threshold(50_000, 20, 100)
MOST_MEMORY = 4e9  # bytes that all processes of a run may need together
MOST_KEPT = 1e9  # bytes that a process may keep after a test; few tests need more than half as much besides
ROOM = 2.5e8  # bytes of programs that are kept in any case: to drop them costs seconds, since they are compiled again
LEFT = [0]  # bytes that were left when programs were last dropped
HIGHEST = {"peak": 0, "test": ""}  # bytes of this process, and the test in which it needed them
PEAKS = []  # of all processes
PROBE = "import jax; jax.jit(lambda: 0)(); assert jax.default_backend() == 'cpu'"


def pytest_configure(config):
    """Have XLA compile in half the time and without optimisation, since most programs of the tests run once.

    Not for slow tests, which train for minutes; not on accelerators, nor where XLA_FLAGS are set: `XLA_FLAGS= pytest`
    tests what XLA makes of programs otherwise.
    """
    if "not slow" in config.option.markexpr and "XLA_FLAGS" not in os.environ:
        numbers = (4, 3, 1) if jax.__version_info__ < (0, 11) else (3, 1)
        known = next(filter(is_known, [" ".join(QUICK[:number]) for number in numbers]), None)
        if known is not None:
            os.environ["XLA_FLAGS"] = known


def is_known(flags):
    probe = subprocess.run([sys.executable, "-c", PROBE], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True)
    return probe.returncode == 0


def pytest_sessionstart(session):
    """Ends where the installed JAX lacks what the package uses of it, and says what."""
    if hasattr(session.config, "workerinput"):
        return
    lacking = []
    for name, check in inspect.getmembers(importlib.import_module("test_jax"), inspect.isfunction):
        if name.startswith("test_"):
            try:
                check()
            except Exception as error:
                lacking.append(f"\n  {name}: {type(error).__name__}: {error}")
    if lacking:
        pytest.exit(f"JAX {jax.__version__} lacks what mf_eqx uses of it:{''.join(lacking)}", 1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    PEAKS.append(getattr(node, "workeroutput", {}).get("highest", HIGHEST))


def pytest_sessionfinish(session):
    """Fails if the processes of a parallel run needed more memory than they may."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["highest"] = HIGHEST
    elif needed() > MOST_MEMORY:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def needed():
    """Bytes that the processes of a parallel run needed together."""
    return sum(found["peak"] for found in PEAKS)


def pytest_terminal_summary(terminalreporter):
    if PEAKS:
        found = " + ".join(f"{found['peak'] / 1e9:.2f} ({found['test']})" for found in PEAKS)
        result = "passed" if needed() <= MOST_MEMORY else "FAILED"
        terminalreporter.write_line(f"memory {result}: peaks of {found} GB, together at most {MOST_MEMORY / 1e9:g} GB")


@pytest.fixture(scope="module", autouse=True)
def settled(request):
    """What the functions of a module keep is dropped after its tests, and what it leaves behind is not searched for
    garbage again and again."""
    yield
    for function in vars(request.module).values():
        if hasattr(function, "cache_clear") and getattr(function, "__module__", "") == request.module.__name__:
            function.cache_clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def within_memory(request):
    """Programs are dropped when there are many: not after each test or module, since all use the same small ones."""
    yield
    if (peak := 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) > HIGHEST["peak"]:
        HIGHEST.update(peak=peak, test=request.node.nodeid)
    if resident() > max(MOST_KEPT, LEFT[0] + ROOM):
        drop_programs()


@pytest.fixture(scope="module")
def room():
    """For a module of which something needs nearly a gigabyte at once: programs are dropped before the first use."""
    drop_programs()


def drop_programs():
    gc.unfreeze()
    eqx.clear_caches()
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # what is free goes back to the system
    LEFT[0] = resident()


def resident():
    """Bytes of memory that this process has; where the system does not tell, the most that it had."""
    if sys.platform == "linux":
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def x64():
    """Float64 for one test; arrays must be created inside it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def full_disk():
    """A function of a number of bytes, whose context allows no longer files: writing beyond fails as on a full disk."""

    @contextlib.contextmanager
    def limited(most):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def refusal_of(capsys):
    """A function that calls another one, which must end the process with exit code 2 and one line on stderr, and
    returns this line. After `progress` it is the last one."""

    def called(function, *arguments, progress=False, **options):
        with pytest.raises(SystemExit) as ended:
            function(*arguments, **options)
        assert ended.value.code == 2
        *before, line = capsys.readouterr().err.strip().splitlines()
        assert progress or not before, before
        return line

    return called


@pytest.fixture
def unchecked():
    """No runtime type checking for one test: the package's own refusal is what users without it see."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
