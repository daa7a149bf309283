"""Imports go one way, and the layers that must not know of each other don't (DESIGN, section 2)."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACE = Path(__file__).resolve().parents[1] / "src" / "pace"

LEAVES = {
    "errors",
    "config",
    "params",
    "outputs",
    "log",
    "console",
    "imports",
    "vllm_names",
    "speculative_config",
    "structured_outputs",
    "pooling_params",
}

ALLOWED: dict[str, set[str]] = {
    # A unit is a module or a package of pace; it may import itself, the leaves, and these.
    "errors": set(),
    "config": set(),
    "params": set(),
    "outputs": set(),
    "log": set(),
    "console": set(),
    "imports": set(),
    "vllm_names": set(),
    "speculative_config": set(),
    "structured_outputs": set(),
    "pooling_params": set(),
    "_ext": set(),
    "models.plan": set(),
    "quant": set(),
    "ops": {"_ext", "models.plan", "quant"},
    "reference": {"models.plan"},
    "checkpoint": {"ops", "quant"},
    "models": {"checkpoint", "ops", "models.plan", "quant"},
    "export": {"checkpoint", "ops", "models", "models.plan", "quant", "engine", "text"},
    "kvcache": {"ops", "models.plan"},
    "text": {"checkpoint"},
    "engine": {"kvcache", "models", "models.plan", "checkpoint", "ops", "quant", "text"},
    "speculative": {"kvcache", "models", "models.plan", "checkpoint", "ops", "text", "engine"},
    "inputs": {"engine", "text", "checkpoint"},
    "driver": {"engine"},
    "frontend": {"inputs", "driver", "engine", "text", "speculative"},
    "llm": {"frontend", "inputs", "driver", "engine"},
    "async_llm": {"frontend", "inputs", "driver", "engine"},
}
TOP = {"cli", "commands", "server", "benchmarks", "train", "__init__", "__main__"}
"""What nothing imports; it may import everything below except `reference` and `_ext`."""


def sources() -> list[Path]:
    return sorted(PACE.rglob("*.py"))


def module_of(path: Path) -> str:
    """engine/core.py -> pace.engine.core; a package's __init__.py is the package."""
    parts = path.relative_to(PACE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def unit_of(module: str) -> str:
    """pace.engine.core -> engine; the plan with its operators, shapes and formats is a unit of its own, as ops and the
    reference speak it."""
    inside = module.split(".")[1:]
    if not inside:
        return "__init__"
    plan = ("plan", "operators", "expert_operators", "shapes", "weight_formats")
    return "models.plan" if inside[0] == "models" and inside[1:2] and inside[1] in plan else inside[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported; `from pace import ops` counts as pace.ops."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                root = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*root, *([base] if base else [])])
            for alias in node.names:
                child = f"{base}.{alias.name}"
                yield node.lineno, child if is_module(child) else base


def is_module(name: str) -> bool:
    path = PACE.parent.joinpath(*name.split("."))
    return name.startswith("pace.") and (path.is_dir() or path.with_suffix(".py").is_file())


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(PACE.parent)}:{line}"


def test_there_is_something_to_check() -> None:
    names = {module_of(path) for path in sources()}
    assert {"pace.ops", "pace.engine.core", "pace.models.decoder", "pace.llm"} <= names
    found = {name for _, name in imports(PACE / "engine" / "loader.py")}
    assert "pace.ops" in found and "pace.engine.build" in found


def test_every_unit_is_placed() -> None:
    units = {unit_of(module_of(path)) for path in sources()}
    assert units <= set(ALLOWED) | TOP, "give a new module its place in ALLOWED"


@pytest.mark.parametrize("path", sources(), ids=lambda path: module_of(path))
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(module_of(path))
    below = set(ALLOWED) - {"reference", "_ext"} | TOP if unit in TOP else ALLOWED[unit]
    for line, name in imports(path):
        if name == "pace" or name.startswith("pace."):
            target = unit_of(name)
            allowed = target in below | LEAVES | {unit} or (name == "pace" and unit in TOP)
            assert allowed, f"{where(path, line)}: {unit} imports {target}"


def test_leaves_import_nothing_but_leaves() -> None:
    for unit in LEAVES:
        for line, name in imports(PACE / f"{unit}.py"):
            assert not name.startswith("pace.") or unit_of(name) in LEAVES, where(PACE / f"{unit}.py", line)


def test_ops_is_the_only_importer_of_the_extension() -> None:
    importers = {
        module_of(path) for path in sources() for _, name in imports(path) if name.startswith("pace._ext")
    }
    assert {name.rpartition(".")[0] for name in importers} == {"pace.ops"}


def test_nothing_imports_the_reference() -> None:
    """It is the tests' oracle."""
    for path in sources():
        for line, name in imports(path):
            assert name != "pace.reference" or module_of(path) == "pace.reference", where(path, line)


def test_no_torch_outside_training() -> None:
    for path in sources():
        if unit_of(module_of(path)) == "train":
            continue
        for line, name in imports(path):
            assert name.split(".")[0] not in {"torch", "transformers"}, where(path, line)


def test_only_its_command_knows_of_training() -> None:
    """And only inside a function: `pace --help` must not wait for torch."""
    for path in sources():
        unit = unit_of(module_of(path))
        for line, name in imports(path):
            if unit != "train" and name.startswith("pace.train"):
                assert module_of(path) == "pace.commands.train", where(path, line)


SERVE = {"starlette", "uvicorn", "uvloop", "msgspec", "prometheus_client"}
"""What `pace[serve]` brings; nothing outside server/ imports it."""
OTEL = {"opentelemetry"}
"""What `pace[otel]` brings; `server/tracing.py` imports it where it is asked for traces."""


def test_only_known_dependencies() -> None:
    """The four of pyproject.toml, and what tokenizers itself brings; `train` has its own."""
    known = {"numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm", "yaml"}
    own = {"pace", *(path.stem for path in PACE.parent.glob("*.py"))}
    for path in sources():
        unit = unit_of(module_of(path))
        if unit == "train":
            continue
        extra = {"benchmarks": {"matplotlib"}, "server": SERVE | OTEL, "text": {"llguidance"}}.get(
            unit, set()
        )
        for line, name in imports(path):
            top = name.split(".")[0]
            assert top in known | extra | own or top in sys.stdlib_module_names, (
                f"{where(path, line)}: {name}"
            )


SHARED = {
    "__init__",
    "common",
    "config",
    "decoder",
    "expert_operators",
    "experts",
    "held",
    "formats",
    "names",
    "operators",
    "weight_formats",
    "plan",
    "quantisation",
    "registry",
    "rope",
    "shapes",
    "sources",
    "spec",
    "tensors",
    "weight_map",
    "weights",
}
"""Files of models/ that are no family's."""


def test_the_decoder_names_no_architecture() -> None:
    """Data-only files know architectures; what turns a spec into a plan does not."""
    families = {path.stem for path in (PACE / "models").glob("*.py")}
    families -= SHARED
    assert {"llama", "qwen3"} <= families
    stems = sorted({re.sub(r"[\d_]+$", "", name) for name in families})
    pattern = re.compile(rf"\b(?:{'|'.join(stems)})(?:\b|[\d_-])", re.I)
    for name in (
        "decoder.py",
        "operators.py",
        "expert_operators.py",
        "plan.py",
        "shapes.py",
        "weight_formats.py",
    ):
        found = pattern.search((PACE / "models" / name).read_text())
        assert not found, f"{name} names {found and found.group()}"


def test_families_hold_no_mathematics() -> None:
    """An architecture is data: no numpy, no operators."""
    for path in (PACE / "models").glob("*.py"):
        if path.stem in SHARED:
            continue
        for line, name in imports(path):
            assert name.split(".")[0] != "numpy" and unit_of(name) != "models.plan", where(path, line)


def test_no_unfinished_code() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
    for path in [*sources(), *(PACE / "_ext").glob("*.[ch]"), *(PACE / "_ext").glob("*.p[yx]*")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not marks.search(line), where(path, number)
