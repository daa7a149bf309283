"""Clients that only some machines have: OpenAI's for Node, lm-eval, LangChain; and a real model behind the server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from real_checkpoint import real_checkpoint
from server.kit import Server, running

import pace
from pace.llm import LLM
from pace.params import SamplingParams

pytestmark = pytest.mark.live

DEMO = Path(pace.__file__).parent / "demo" / "target"
NODE_CLIENT = "openai@6"

NODE_SCRIPT = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[1], apiKey: "none", maxRetries: 0 });
const chat = { model: "demo", messages: [{ role: "user", content: "Write a loop." }], temperature: 0, max_tokens: 16 };
(async () => {
  const result = { models: [] };
  for await (const model of client.models.list()) result.models.push(model.id);
  const whole = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 2 });
  result.text = whole.choices[0].message.content;
  result.logprobs = whole.choices[0].logprobs.content.map((entry) => entry.top_logprobs.length);
  result.streamed = "";
  const stream = await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    result.streamed += chunk.choices[0]?.delta.content ?? "";
    result.usage = chunk.usage;
  }
  const asked = { model: "demo", input: "Write a loop.", temperature: 0, max_output_tokens: 16 };
  const response = await client.responses.create(asked);
  result.response = response.output_text;
  try {
    await client.chat.completions.create({ ...chat, temperature: -1 });
  } catch (error) {
    result.error = [error instanceof OpenAI.BadRequestError, error.param];
  }
  console.log(JSON.stringify(result));
})();
"""


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """A folder with the client, fetched once from npm."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pace-tests"
    folder = cache / NODE_CLIENT.replace("@", "-")
    if not (folder / "node_modules" / "openai").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            npm,
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--prefix",
            str(folder),
            NODE_CLIENT,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm can't fetch {NODE_CLIENT}: {done.stderr[-200:]}")
    return folder / "node_modules"


def test_the_node_client(server: Server, node_modules: Path) -> None:
    done = subprocess.run(
        ["node", "-e", NODE_SCRIPT, f"{server.url}/v1"],
        env=os.environ | {"NODE_PATH": str(node_modules)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["models"] == ["demo"] and result["text"] and result["error"] == [True, "temperature"]
    assert result["streamed"] == result["text"] == result["response"]
    assert result["usage"]["completion_tokens"] == len(result["logprobs"]) and set(result["logprobs"]) == {2}


PAIRS = [
    ("def fibonacci(n):\n    ", "return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"),
    ("import os\n", "import sys"),
    ("for i in ", "range(10):"),
    ("class A:\n    def __init__(self", "):"),
    ("", "import os"),
]


@pytest.fixture(scope="module")
def lm_eval(server: Server) -> Any:
    models = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval")
    pytest.importorskip("transformers", reason="lm-eval's tokenizer")
    return models.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="demo",
        tokenizer=str(DEMO),
        tokenizer_backend="huggingface",
        max_length=512,
        batch_size=3,
    )


def test_lm_eval_scores_what_the_library_scores(lm_eval: Any) -> None:
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    scores = lm_eval.loglikelihood(requests)
    with LLM("demo", threads=1) as llm:
        for (context, continuation), (score, is_greedy) in zip(PAIRS, scores, strict=True):
            if context:
                ids, rest = lm_eval._encode_pair(context, continuation)
                tokens, n_context = [*ids, *rest], len(ids)
            else:
                tokens, n_context = [lm_eval.prefix_token_id, *lm_eval.tok_encode(continuation)], 1
            (want,) = llm.generate(
                {"prompt_token_ids": tokens}, SamplingParams(max_tokens=1, prompt_logprobs=1)
            )
            assert want.prompt_logprobs is not None
            entries = [entry for entry in want.prompt_logprobs[n_context:] if entry is not None]
            own = [entry[token] for entry, token in zip(entries, tokens[n_context:], strict=True)]
            assert score == sum(entry.logprob for entry in own)  # the same floats, added in the same order
            assert is_greedy == all(entry.rank == 1 for entry in own)


def test_lm_eval_generates_what_the_library_generates(lm_eval: Any) -> None:
    from lm_eval.api.instance import Instance

    options = {"until": ["\n\n"], "max_gen_toks": 24}
    prompts = [context for context, _ in PAIRS if context]
    requests = [
        Instance("generate_until", {}, (prompt, dict(options)), i) for i, prompt in enumerate(prompts)
    ]
    texts = lm_eval.generate_until(requests)
    params = SamplingParams(temperature=0.0, max_tokens=24, stop=["\n\n"])
    with LLM("demo", threads=1) as llm:
        ids: list[Any] = [{"prompt_token_ids": lm_eval.tok_encode(prompt)} for prompt in prompts]
        assert texts == [want.outputs[0].text for want in llm.generate(ids, params)]


def test_langchain(server: Server, client: openai.OpenAI) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    options: Any = {"model": "demo", "temperature": 0, "max_tokens": 16}
    chat = langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", stream_usage=True, **options)
    messages: Any = [{"role": "user", "content": "Write a loop."}]
    want = client.chat.completions.create(messages=messages, **options)
    answer = chat.invoke("Write a loop.")
    assert answer.content == want.choices[0].message.content
    assert want.usage is not None and answer.usage_metadata["output_tokens"] == want.usage.completion_tokens
    chunks = list(chat.stream("Write a loop."))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == (
        want.usage.completion_tokens
    )
    schema = {"title": "A", "type": "object", "properties": {"ok": {"enum": [True, False]}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    roomy = langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="demo", temperature=0)
    filled = roomy.with_structured_output(schema, method="json_schema").invoke("Is it?")
    assert filled["ok"] in (True, False)


@pytest.fixture(scope="module")
def real() -> Iterator[openai.OpenAI]:
    """A client of a server of a trained model; its template knows no tools, so the form of calls is told."""
    with (
        running("--tool-call-parser", "hermes", model=str(real_checkpoint())) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_real_model_answers_fills_a_schema_and_calls(real: openai.OpenAI) -> None:
    (model,) = [model.id for model in real.models.list()]
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    options: Any = {"model": model, "temperature": 0, "max_tokens": 60}
    answer = real.chat.completions.create(messages=messages, **options)
    assert "Paris" in (answer.choices[0].message.content or "") and answer.choices[0].finish_reason == "stop"
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "is_large": {"type": "boolean"}},
        "required": ["capital", "is_large"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    filled = real.chat.completions.create(messages=messages, response_format=form, **options)
    city = json.loads(filled.choices[0].message.content or "")
    assert "Paris" in city["capital"] and isinstance(city["is_large"], bool)
    tools: Any = [{"type": "function", "function": {"name": "capital_of", "parameters": {
        "type": "object", "properties": {"country": {"type": "string", "maxLength": 20}},
        "required": ["country"], "additionalProperties": False}}}]  # fmt: skip
    called = real.chat.completions.create(messages=messages, tools=tools, tool_choice="required", **options)
    assert called.choices[0].finish_reason == "tool_calls"
    (call,) = called.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "capital_of"
    assert set(json.loads(call.function.arguments)) == {"country"}
