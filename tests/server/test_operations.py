"""Keys, limits, logs, metrics: what those who run a server rely on."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.kit import ScriptedBackend, Server

from pace.server.app import ROUTES, make_app
from pace.server.gate import OPEN_PATHS
from pace.server.keys import Keys, read_keys
from pace.server.metrics import Metrics
from pace.server.protocol.errors import ApiError
from pace.server.service import Service
from pace.server.wire import Delta, Done, Event, Job


def ok(job: Job) -> list[list[Event]]:
    return [[Delta(job.id, 0, "secret answer", [1], finish_reason="stop"), Done(job.id, 3, 0, 1)]]


def ask(app: Any, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(main())


def app(keys: Keys | None = None, **options: Any) -> Any:
    return make_app(Service(ScriptedBackend(ok), ["m"], None, keys), **options)


PATHS = sorted({(entry.method, entry.path.replace("{name}", "m")) for entry in ROUTES})
ODD_PATHS = [
    ("POST", "//v1/completions"), ("POST", "/v1%2fcompletions"), ("POST", "/V1/completions"),
    ("POST", "/v1/completions/"), ("GET", "/health/../metrics"), ("GET", "/healthz"), ("GET", "/health/"),
    ("GET", "/ping/../v1/models"), ("GET", "/nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PATHS + ODD_PATHS)
@pytest.mark.parametrize("host", ["test", "x/health?", "health"])
def test_every_route_but_health_asks_for_a_key(method: str, path: str, host: str) -> None:
    keys = Keys(["right", "other"])
    headers = [
        {"host": host},
        {"host": host, "authorization": "Bearer wrong"},
        {"host": host, "authorization": "right"},
        {"host": host, "x-api-key": ""},
        {"host": host, "authorization": "Bearer other"},
        {"host": host, "x-api-key": "right"},
    ]
    answers = ask(app(keys), *((method, path, {"headers": one, "content": b"{}"}) for one in headers))
    statuses = [answer.status_code for answer in answers]
    if path in OPEN_PATHS:
        assert statuses == [200] * 6
    else:
        assert statuses[:4] == [401] * 4 and 401 not in statuses[4:]
        assert answers[0].json()["error"]["type"] == "authentication_error"


def test_keys_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\none\n\n two \n")
    assert read_keys(str(tmp_path / "keys")) == ["one", "two"]
    keys = Keys(["one", "two"])
    assert keys.check([(b"authorization", b"bearer two")]) == 1
    with pytest.raises(ApiError):
        keys.check([(b"authorization", b"Basic two")])


def test_a_key_has_its_share_and_no_more() -> None:
    keys = Keys(["a", "b"], max_open=2)
    keys.open(0)
    keys.open(0)
    with pytest.raises(ApiError) as raised:
        keys.open(0)
    assert raised.value.status == 429 and raised.value.headers["retry-after"]
    keys.open(1)
    keys.close(0)
    keys.open(0)


def test_the_access_log_has_no_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    body = {"prompt": "secret question", "user": "secret user"}
    headers = {"x-request-id": "abc", "authorization": "Bearer secret key"}
    ask(
        app(Keys(["secret key"]), access_log=True),
        ("POST", "/v1/completions", {"json": body, "headers": headers}),
    )
    log = capsys.readouterr().err
    line = json.loads(log)
    assert line["id"] == "abc" and line["status"] == 200 and line["path"] == "/v1/completions"
    assert "secret" not in log


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "ä".encode().decode("latin-1")])
def test_request_ids_that_could_hurt_a_log_are_replaced(given: str) -> None:
    headers = [(b"x-request-id", given.encode("latin-1"))]
    (answer,) = ask(app(), ("GET", "/version", {"headers": headers}))
    assert answer.headers["x-request-id"] != given and len(answer.headers["x-request-id"]) == 32


def test_an_internal_error_says_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("the secret inside")

    monkeypatch.setattr(ScriptedBackend, "submit", fail)
    (answer,) = ask(app(), ("POST", "/v1/completions", {"json": {"prompt": "x"}}))
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_origins() -> None:
    allowed = app(origins=["https://page.example"])
    options = {"headers": {"origin": "https://page.example", "access-control-request-method": "POST"}}
    (answer,) = ask(allowed, ("OPTIONS", "/v1/completions", options))
    assert (
        answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://page.example"
    )


VLLM_NAMES = {
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge",
    "cache_config_info": "gauge", "prompt_tokens": "counter", "generation_tokens": "counter",
    "request_success": "counter", "prefix_cache_queries": "counter", "prefix_cache_hits": "counter",
    "num_preemptions": "counter", "time_to_first_token_seconds": "histogram", "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
    "spec_decode_num_accepted_tokens": "counter",
}  # fmt: skip


def test_metrics_have_the_names_that_gateways_and_dashboards_know(server: Server) -> None:
    body = {"prompt": "x", "max_tokens": 5, "ignore_eos": True}
    before = metrics_of(server)
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    after = metrics_of(server)
    for prefix in ("pace:", "vllm:"):
        for name, kind in VLLM_NAMES.items():
            assert after[prefix + name].type == kind, prefix + name
        assert value(after, prefix + "generation_tokens") - value(before, prefix + "generation_tokens") == 5
        name = prefix + "time_to_first_token_seconds"
        counts = [value(metrics, name, name + "_count") for metrics in (before, after)]
        assert counts[1] - counts[0] == 1
    assert value(after, "pace:healthy", "pace:healthy") == 1.0
    assert httpx.get(f"{server.url}/load").json() == {"server_load": 0}
    assert httpx.get(f"{server.url}/v1/config").json()["kv_cache_type"] == "slab"
    idle = {"queue_size": 0, "active_requests": 0}
    deadline = time.monotonic() + 2  # an engine tells how long its queue is several times a second
    while httpx.get(f"{server.url}/v1/queue/status").json() != idle:
        assert time.monotonic() < deadline
    assert httpx.get(f"{server.url}/v1/server_metrics").json()["engines"][0]["n_steps"] > 0


def test_accepted_tokens_are_counted_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ScriptedBackend(ok)
    told = [{"speculative": {"accepted_at": [7, 3]}}, {"speculative": {"accepted_at": [5]}}, {}]
    monkeypatch.setattr(backend, "stats", lambda: told)
    text = Metrics(Service(backend, ["m"], None, None)).text().decode()
    found = {
        (one.labels["engine"], one.labels["position"]): one.value
        for family in text_string_to_metric_families(text)
        if family.name == "vllm:spec_decode_num_accepted_tokens_per_pos"
        for one in family.samples
    }
    assert found == {("0", "0"): 7, ("0", "1"): 3, ("1", "0"): 5}


def metrics_of(server: Server) -> dict[str, Any]:
    text = httpx.get(f"{server.url}/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(metrics: dict[str, Any], name: str, sample: str | None = None) -> float:
    wanted = sample or name + "_total"
    return sum(float(one.value) for one in metrics[name].samples if one.name == wanted)


def test_tokenize_and_back(server: Server) -> None:
    text = "def f(x):\n    return 'é'"
    ask = {"prompt": text, "return_token_strs": True, "add_special_tokens": False}
    got = httpx.post(f"{server.url}/tokenize", json=ask).json()
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"]) and got["max_model_len"] == 2048
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": got["tokens"]}).json()
    assert back == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    tokens = httpx.post(f"{server.url}/tokenize", json=chat).json()["tokens"]
    shown = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert shown == "<|endoftext|><|user|>hi<|end|><|assistant|>"
    for bad in ({"prompt": "a", **chat}, {}, {"prompt": "a", "foo": 1}):
        assert httpx.post(f"{server.url}/tokenize", json=bad).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [1 << 40]}).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [1 << 70]}).status_code == 400


def test_keys_tls_unix_sockets_and_a_full_queue(tmp_path: Path) -> None:
    """One server with all of it, a single sequence at a time and none that waits."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with openssl")
    cert, key, keys = (str(tmp_path / name) for name in ("cert", "key", "keys"))
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        cert,
        *subject,
    ]
    subprocess.run(command, check=True, capture_output=True)
    Path(keys).write_text("the key\n")
    path = str(tmp_path / "socket")
    args = ["--uds", path, "--ssl-certfile", cert, "--ssl-keyfile", key, "--api-key-file", keys]
    server = Server(*args, "--max-num-seqs", "1", "--max-num-waiting", "0")
    context = ssl.create_default_context(cafile=cert)
    transport = httpx.HTTPTransport(uds=path, verify=context)
    http = httpx.Client(transport=transport)
    try:
        assert server.url == f"unix:{path}"
        assert http.get("https://localhost/health").status_code == 200
        base: Any = {"base_url": "https://localhost/v1", "http_client": http}
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(api_key="wrong", **base).models.list()
        client = openai.OpenAI(api_key="the key", max_retries=0, **base)
        options: Any = {"model": "demo", "prompt": "x", "temperature": 0, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**options, max_tokens=2000, stream=True)  # for seconds
        next(stream)
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(**options, max_tokens=2)
        assert raised.value.response.headers["retry-after"] == "1" and raised.value.code == "queue_full"
        patient = client.with_options(max_retries=20)
        assert patient.completions.create(**options, max_tokens=2).choices[0].finish_reason == "length"
        stream.close()
    finally:
        http.close()
        server.kill()


def test_a_client_that_leaves_frees_its_sequence(server: Server) -> None:
    for body in ({"stream": True}, {}):
        with server.connect() as connection:
            data = json.dumps({"prompt": "x", "max_tokens": 1900, "ignore_eos": True} | body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            while httpx.get(f"{server.url}/load").json()["server_load"] == 0:
                pass
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        for _ in range(400):
            queue = httpx.get(f"{server.url}/v1/server_metrics").json()["engines"][0]
            if httpx.get(f"{server.url}/load").json()["server_load"] == 0 and queue["n_requests"] == 0:
                break
        else:
            raise AssertionError("the request runs on")
        assert queue["kv_usage"] == 0.0
