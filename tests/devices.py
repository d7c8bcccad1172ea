"""Scripts in a process of their own that sees eight forced CPU devices."""

import json
import os
import pathlib
import subprocess
import sys

from fields import quick_options

TESTS = pathlib.Path(__file__).parent


def run_on_devices(script, *arguments):
    """What the last line says that a script of the tests prints, in JSON."""
    # All but the first shorten compiling to a third and change no pass that places collectives.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags += " --xla_llvm_disable_expensive_passes=true"
    if quick_options() is not None:  # this XLA knows it
        flags += " --xla_cpu_use_fusion_emitters=false"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])
