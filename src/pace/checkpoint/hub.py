"""From what the user calls a model to a local folder or GGUF file: "demo", a path, or a Hugging Face hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pace.checkpoint.pooling_config import POOLING_CONFIG
from pace.errors import CheckpointError, one_line, show

__all__ = ["DEMO_MODEL", "resolve"]

DEMO_MODEL = "demo"
GGUF = ".gguf"

_DEMO = Path(__file__).resolve().parent.parent / "demo"
_EMBEDDED = {DEMO_MODEL: _DEMO / "target", "demo-draft": _DEMO / "draft"}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# model*: repositories also carry the same weights as consolidated.safetensors and under original/.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    POOLING_CONFIG,
)


def resolve(
    model: str | os.PathLike[str], revision: str | None = None, *, tokenizer_only: bool = False
) -> Path:
    """Return the absolute path of the folder that holds the model, or of its GGUF file, downloading a hub id where needed.

    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN act as in every program that uses `huggingface_hub`.

    Args:
        model: "demo" or "demo-draft" (the embedded model and its draft), a folder, a GGUF file, a model's folder in the hub
            cache (`models--org--name`), or a hub id `org/name`.
        revision: branch, tag or commit; for hub ids and folders of the hub cache.
        tokenizer_only: of a hub id, fetch only the tokenizer's files.

    Raises:
        CheckpointError: none of these, or the download failed; the message says what was tried.
    """
    text = os.fspath(model)
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(
            f"model is {show(text)}, expected a folder, a hub id org/name, or {DEMO_MODEL!r}"
        )
    if text in _EMBEDDED:
        if not _EMBEDDED[text].is_dir():
            raise CheckpointError(
                f"the embedded model isn't in this installation: no folder {_EMBEDDED[text]}"
            )
        return _local(_EMBEDDED[text], revision)
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if path.is_dir():
        return _local(path, revision)
    if path.exists():
        if path.suffix.lower() == GGUF:
            return _local(path, revision)
        raise CheckpointError(
            f"{path}: a file, expected the folder that holds config.json and model.safetensors, or a {GGUF} file"
        )
    if not _HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        raise CheckpointError(
            f"{text}: no such folder, and not a hub id org/name; {DEMO_MODEL!r} is the embedded model"
        )
    return _download(text, revision, _TOKENIZER_FILES if tokenizer_only else _TOKENIZER_FILES + _MODEL_FILES)


def _local(path: Path, revision: str | None) -> Path:
    path = path.resolve()
    repo = path.parent if path.name == "snapshots" else path
    if repo.name.startswith("models--") and (repo / "snapshots").is_dir():
        try:
            return _snapshot(repo, revision)
        except OSError as error:
            raise CheckpointError(f"{repo}: cannot be read: {error.strerror or error}") from None
    if revision is not None:
        raise CheckpointError(f"revision {show(revision)} is for hub ids, but the model is {path}")
    return path


def _snapshot(path: Path, revision: str | None) -> Path:
    """The snapshot that a folder of the hub cache holds of a revision; by default of main, else the only one."""
    snapshots = sorted(folder.name for folder in (path / "snapshots").iterdir() if folder.is_dir())
    name = revision or "main"
    plain = not any(part in ("", ".", "..") for part in name.split("/")) and "\0" not in name
    ref = path / "refs" / name
    commit = ref.read_text("utf-8", "replace").strip() if plain and ref.is_file() else name
    if commit in snapshots:
        return path / "snapshots" / commit
    if revision is None and len(snapshots) == 1:
        return path / "snapshots" / snapshots[0]
    raise CheckpointError(
        f"{path}: no snapshot of revision {show(name)}; there are {', '.join(snapshots) or 'none'}: name one as revision"
    )


def _download(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    tried = f"no folder {repo_id} here, and the hub id at revision {revision or 'main'} failed"
    try:
        # Not at the top: it costs 0.2 s, and most runs read a local folder.
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns))
    except ImportError as error:
        raise CheckpointError(f"{tried}: {error}; pip install huggingface_hub, or pass a folder") from None
    except (
        Exception
    ) as error:  # the hub client raises its own, httpx's and OS errors; all end the same way here
        offline = "; HF_HUB_OFFLINE is set, so only the local cache was searched" if _is_offline() else ""
        reason = one_line(str(error).split("\n\n")[0], 300)
        raise CheckpointError(f"{tried}: {type(error).__name__}: {reason}{offline}") from None
    return Path(folder).resolve()


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
