"""Call a script with a configuration in JSON instead of flags: needs no tyro.

    python benchmarks/call_script.py benchmarks/jvp_overhead.py '{"model": ["B/4"], "rounds": 3}'
    python benchmarks/call_script.py experiments/fashion.py '{"preset": "gpu", "steps": 1000}'

Names are those of the script's `Config`, values that are left out its defaults, or those of the preset. The script runs
in the current directory, below which its runs land, and can import what stands beside it.
"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any


def configured(script: Any, values: dict[str, Any]) -> Any:
    """The script's configuration with these values."""
    values = {name: _as_tuples(value) for name, value in values.items()}
    preset = values.pop("preset", None)
    base = script.Config() if preset is None else script.PRESETS[preset][1]
    return dataclasses.replace(base, **values)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def main(path: str, values: str) -> None:
    root = Path(__file__).resolve().parents[1]
    sys.argv[0] = path  # after which runs are named
    sys.path[:0] = [str(Path(path).resolve().parent), str(root / "experiments"), str(root)]
    script = importlib.import_module(Path(path).stem)
    script.main(configured(script, json.loads(values)))


if __name__ == "__main__":
    main(*sys.argv[1:])
