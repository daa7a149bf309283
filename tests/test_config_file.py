"""`pace serve --config`: the flags in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pace.cli import main
from pace.server.serve import ServeOptions

GOOD = """
model: demo
port: 9000
max-model-len: 100
max_num_seqs: 3
api-key: [a, b]
served-model-name: m
enable-prefix-caching: false
trust-request-chat-template: true
shutdown-timeout: 2.5
speculative-config: {method: suffix}
tool-call-parser: llama3_json
uds: null
"""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    seen: list[ServeOptions] = []

    def serve(options: ServeOptions) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr("pace.server.serve.serve", serve)
    return seen


def write(path: Path, text: str) -> str:
    file = path / "serve.yaml"
    file.write_text(text)
    return str(file)


def test_a_file_says_what_flags_would(tmp_path: Path, served: list[ServeOptions]) -> None:
    assert main(["serve", "--config", write(tmp_path, GOOD)]) == 0
    argv = ["demo", "--port", "9000", "--max-model-len", "100", "--max-num-seqs", "3", "--api-key", "a"]
    argv += ["--api-key", "b", "--served-model-name", "m", "--no-enable-prefix-caching"]
    argv += [
        "--trust-request-chat-template",
        "--shutdown-timeout",
        "2.5",
        "--tool-call-parser",
        "llama3_json",
    ]
    assert main(["serve", *argv, "--speculative-config", '{"method": "suffix"}']) == 0
    assert served[0] == served[1]


def test_what_is_given_beside_the_file_wins(tmp_path: Path, served: list[ServeOptions]) -> None:
    file = write(tmp_path, GOOD)
    argv = ["--port", "1", "--served-model-name", "x", "y", "--enable-prefix-caching"]
    assert main(["serve", "demo-draft", "--config", file, *argv]) == 0
    (options,) = served
    assert (options.port, options.names, options.config.model) == (1, ("x", "y"), "demo-draft")
    assert options.config.enable_prefix_caching and options.config.max_model_len == 100


def test_flags_of_vllm(served: list[ServeOptions]) -> None:
    argv = ["--dtype", "bfloat16", "--chat-template-content-format", "string", "--chat_template", "own.jinja"]
    assert main(["serve", "demo", *argv, "--seed", "3", "--disable-log-requests"]) == 0
    assert main(["serve", "demo"]) == 0
    said, usual = served
    assert (said.config.chat_template, said.config.seed, said.access_log) == ("own.jinja", 3, False)
    assert (usual.config.chat_template, usual.config.seed, usual.access_log) == (None, 0, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-modl-len: 3", "unknown key 'max-modl-len': expected the name of an option"),
        ("enable_lora: true", "unknown key 'enable_lora': merge the adapter"),
        ("config: other.yaml", "unknown key 'config'"),
        ("port: abc", "port: 'abc' is not a port"),
        ("port: [1]", "port is [1], expected text or a number"),
        ("access-log: 1", "access-log is 1, expected true or false"),
        ("on-engine-death: dance", "on-engine-death is 'dance', expected restart or exit"),
        ("- a", "expected names of options and their values"),
        ("a: b: c", "not YAML"),
        ("{}", "which model?"),
    ],
)
def test_what_is_wrong_is_named(
    text: str, message: str, tmp_path: Path, served: list[ServeOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, text)
    assert main(["serve", "--config", file]) == 2
    err = capsys.readouterr().err
    assert message in err and not served and err.count("\n") == 1


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "demo", "--config", "/nowhere.yaml"]) == 2
    assert "/nowhere.yaml: cannot be read" in capsys.readouterr().err
