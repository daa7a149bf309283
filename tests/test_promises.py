"""What SECURITY.md promises: each has a test here, or names tests elsewhere that exist."""

from __future__ import annotations

import ast
import hmac
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pace
from pace.cli import _parse
from pace.config import EngineConfig
from pace.errors import PaceError
from pace.llm import LLM
from pace.params import SamplingParams
from pace.server.keys import Keys
from pace.server.protocol.errors import ApiError

PACE = Path(pace.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
DEMO = PACE / "demo" / "target"

in_checkout = pytest.mark.skipif(not (ROOT / "SECURITY.md").is_file(), reason="needs the source checkout")


@in_checkout
def test_every_test_that_security_md_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`((?:tests/)?[\w/]*(?:\.py)?)::(\w+)`|`(tests/[\w/.]+)`", text)
    assert len(named) > 20
    file = ""
    for path, test, whole in named:
        if whole:
            assert (ROOT / whole).exists(), whole
            continue
        file = path or file  # `::name` is of the file before
        found = next(iter((ROOT / "tests").rglob(Path(file).name)), None)
        assert found is not None, file
        assert f"def {test}(" in found.read_text(), f"{file}::{test}"


FORBIDDEN = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@pytest.mark.parametrize("path", sorted(PACE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACE)))
def test_nothing_is_unpickled_and_no_text_becomes_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not FORBIDDEN & {name.partition(".")[0] for name in names}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if is_torch and node.func.attr == "load":
                assert any(word.arg == "weights_only" for word in node.keywords)


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    """A folder that brings modules for every hook that transformers has; pace imports none of them."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    trap = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(trap)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with LLM(folder, threads=1) as llm:
            llm.generate("x", SamplingParams(max_tokens=1))
    except PaceError:
        pass  # it may be refused
    assert not (folder / "ran").exists()


NO_NETWORK = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.gethostbyname"):
        sys.stderr.write(f"{event} {args}\\n")
        raise SystemExit(3)
sys.addaudithook(hook)
from pace import LLM, SamplingParams
with LLM("demo", threads=1) as llm:
    llm.generate("x", SamplingParams(max_tokens=2))
    llm.chat([{"role": "user", "content": "see http://127.0.0.1:1/x.png"}], SamplingParams(max_tokens=2))
"""


def test_no_network_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_server_is_local_unless_told() -> None:
    from pace.server.serve import ServeOptions

    assert _parse(["serve", "demo"]).host == "127.0.0.1"
    assert ServeOptions(EngineConfig("demo"), ("demo",)).host == "127.0.0.1"


def test_a_key_is_compared_with_all_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is, right or wrong, long or short: one comparison of digests for each key that is known."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    keys = Keys(["first", "second", "third"])
    monkeypatch.setattr(hmac, "compare_digest", counting)
    for given in (b"first", b"third", b"wrong", b"", b"x" * 100_000):
        compared.clear()
        try:
            keys.check([(b"x-api-key", given)])
        except ApiError as error:
            assert error.status == 401
        assert compared == [(32, 32)] * 3


@in_checkout
def test_every_documented_limit_is_the_programs() -> None:
    """The defaults in the table of docs/serving.md are those of the options beside them."""
    table = (ROOT / "docs" / "serving.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    options = _parse(["serve", "demo"])
    units = {"s": 1.0, "MiB": float(1 << 20)}
    checked = set()
    for row in re.findall(r"^\| (.+?) \| (.+?) \| (.*?) \| .+ \|$", table, re.MULTILINE):
        names = re.findall(r"--([a-z-]+)", row[2])
        told = re.findall(r"([\d.]+) ?(s|MiB)?(?=,|$)", row[1])
        for name in names:
            field = name.replace("-", "_")
            value = getattr(options, field)
            if value is None:  # the engine's own
                value = getattr(EngineConfig("demo"), field, None)
            if value is None:
                assert row[1] == "any" or name == "max-model-len", name
            else:
                assert any(float(n) * units.get(unit, 1.0) == value for n, unit in told), (
                    name,
                    row[1],
                    value,
                )
            checked.add(name)
    assert checked >= {
        "max-body-bytes",
        "body-timeout",
        "head-timeout",
        "max-n",
        "slow-client-timeout",
        "max-num-waiting",
    }
