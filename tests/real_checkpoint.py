"""A real, trained checkpoint for tests: made once, of a package that carries one, and kept in ~/.cache/pace-tests."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "real_model.py"


def real_checkpoint() -> Path:
    """Its folder; skips the test where it can't be made."""
    pytest.importorskip("gguf")
    if not SCRIPT.is_file():
        pytest.skip("needs the source checkout")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pace-tests"
    version = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    target = cache / f"smollm2-135m-instruct-{version}"
    if not target.is_dir():
        spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        unfinished = cache / f"{target.name}.{os.getpid()}"
        try:
            script.main([str(unfinished)])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"the model's package can't be fetched: {getattr(error, 'stderr', None) or error}")
        if not target.is_dir():
            unfinished.rename(target)
    return target
