"""Scripts in a process of their own that sees eight forced CPU devices."""

import json
import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def run_on_devices(script, *arguments):
    """What the last line says that a script of the tests prints, in JSON."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])
