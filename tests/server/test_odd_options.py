"""Options of `pace serve` that can't be meant: each is told in a line, before anything is loaded, with exit code 2."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from pace.cli import main


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What `pace serve demo` says of these arguments."""
    code: object
    try:
        code = main(["serve", "demo", "--port", "0", *args])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in said and "internal" not in said
    return said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--uds", ""], "'' is no name"),
        (["--served-model-name", ""], "'' is no name"),
        (["--max-n", "1000"], "'1000' is above 128"),
        (["--seed", "-1"], "seed is -1, expected an integer"),
        (["--dtype", "float16"], "pace computes in bfloat16"),
        (["--chat-template-content-format", "openai"], "templates that loop over a message's content"),
        (["--chat-template", "/nowhere"], "/nowhere: cannot be opened"),
        (["--api-key", "a\nb"], "no header can carry it"),
        (["--api-key", " a"], "no header can carry it"),
        (["--ssl-keyfile", "/nowhere"], "ssl_keyfile is given without ssl_certfile"),
        (["--ssl-ca-certs", "/nowhere"], "ssl_ca_certs is given without ssl_certfile"),
        (["--ssl-certfile", "/nowhere"], "can't serve TLS"),
        (["--otlp-traces-endpoint", "collector:4318"], "is no address"),
    ],
)
def test_options_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in told(capsys, *args)


def test_certificates_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is none, and a key with a password, for which OpenSSL would ask at the terminal."""
    none = tmp_path / "none"
    none.write_text("")
    assert "can't serve TLS" in told(capsys, "--ssl-certfile", str(none))
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its key with openssl")
    cert, key = str(tmp_path / "cert"), str(tmp_path / "key")
    request = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-passout",
        "pass:secret",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run([*request, "-keyout", key, "-out", cert], check=True, capture_output=True)
    assert "can't serve TLS" in told(capsys, "--ssl-certfile", cert, "--ssl-keyfile", key)
    subprocess.run(
        [openssl, "rsa", "-in", key, "-passin", "pass:secret", "-out", key], check=True, capture_output=True
    )
    args = ["--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", str(none)]
    assert "can't check clients' certificates" in told(capsys, *args)


def test_a_unix_socket_in_use_is_not_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        assert "Address already in use" in told(capsys, "--uds", str(path))
        assert path.is_socket()
