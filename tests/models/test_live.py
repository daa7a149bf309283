"""The reference against transformers in float32, on checkpoints that transformers itself wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import tiny
from golden.harness import in_chunks, load, prefill, relative_error

pytestmark = pytest.mark.live

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# max |difference| / max |logit|; measured 4e-7 to 1.2e-6 over the cases (float32 in transformers).
TOLERANCE = 1e-5


def randomise(model: Any, seed: int) -> None:
    """bf16 values of about unit gain, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                values *= 1.3 / parameter.shape[1] ** 0.5
            else:
                values = 0.2 * values + (0.0 if name.endswith("bias") else 1.0)
            parameter.copy_(values.to(torch.bfloat16))


def saved(config: dict[str, Any], directory: Path, seed: int = 0, shards: bool = False) -> Any:
    """A transformers model of a config, saved in bf16; returns the float32 model with the same weights."""
    values = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    hf = transformers.AutoConfig.for_model(config["model_type"], **values)
    model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float().eval()
    randomise(model, seed)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="100KB" if shards else "5GB")
    # A model cast to bf16 and back keeps its weights, but not its float32 rotary buffers: load it again.
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens]), use_cache=False).logits[0].numpy())


@pytest.mark.parametrize("name", sorted(tiny.CASES))
def test_saved_checkpoint_matches(name: str, tmp_path: Path) -> None:
    case = tiny.CASES[name]
    model = saved(case.config, tmp_path)
    tokens = tiny.prompt(name)
    ours = load(tmp_path, case.max_model_len)
    assert relative_error(prefill(ours.reference(), tokens), logits_of(model, tokens)) < TOLERANCE


@pytest.mark.parametrize(
    "architecture", ["llama-gqa8", "qwen2-window", "qwen3-layer-types", "mistral-window"]
)
def test_sharded_checkpoint_token_by_token(architecture: str, tmp_path: Path) -> None:
    model = saved(tiny.CASES[architecture].config, tmp_path, seed=1, shards=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = tiny.prompt(architecture)
    got = in_chunks(load(tmp_path, tiny.N_TOKENS).reference(), tokens, 1, [2, 0, 1])
    assert relative_error(got, logits_of(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("stored", ["embedding", "head", "both alike", "two"])
@pytest.mark.parametrize("name", ["llama-gqa4-tied", "qwen2-tied"])
def test_a_config_that_ties_over_every_form_of_the_file(name: str, stored: str, tmp_path: Path) -> None:
    """The head is what the file holds, as in transformers 5, whatever the config says."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 drops a head that differs")
    arrays: dict[str, Any] = dict(tiny.tensors(name))
    embed = arrays.pop("model.embed_tokens.weight")
    if stored != "head":
        arrays["model.embed_tokens.weight"] = embed
    if stored != "embedding":
        arrays["lm_head.weight"] = np.roll(embed, 1, axis=0) if stored == "two" else embed
    (tmp_path / "config.json").write_text(json.dumps(tiny.CASES[name].config))
    tiny.write_safetensors(tmp_path / "model.safetensors", arrays)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours, tokens = load(tmp_path, tiny.N_TOKENS), tiny.prompt(name)
    assert ours.spec.tied == (stored != "two")
    assert relative_error(prefill(ours.reference(), tokens), logits_of(model, tokens)) < TOLERANCE


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-mha", {"pretraining_tp": 2}),
        ("llama-mha", {"sliding_window": 64, "layer_types": ["full_attention"] * 2}),
        ("llama-mha", {"rope_scaling": {"rope_type": "default", "factor": 8.0}}),
        (
            "rope-linear",
            {"rope_scaling": {"type": "linear", "factor": 2.5, "beta_fast": 32, "truncate": None}},
        ),
        ("rope-yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}),
        ("qwen2-window", {"attention_bias": False, "mlp_bias": True}),
        ("mistral-window", {"attention_bias": True, "architectures": None}),
    ],
)
def test_what_is_let_pass_changes_nothing_in_transformers(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = tiny.write(name, tmp_path / name)
    (directory / "config.json").write_text(json.dumps({**tiny.CASES[name].config, **changes}))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours, tokens = load(directory, tiny.CASES[name].max_model_len), tiny.prompt(name)
    assert relative_error(prefill(ours.reference(), tokens), logits_of(model, tokens)) < TOLERANCE


def test_long_prompt_crosses_many_blocks(tmp_path: Path) -> None:
    config = {**tiny.CASES["rope-llama3"].config, "max_position_embeddings": 512}
    model = saved(config, tmp_path, seed=2)
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, tiny.VOCAB_SIZE, 250)]
    got = prefill(load(tmp_path, 512).reference(), tokens)
    assert relative_error(got, logits_of(model, tokens)) < TOLERANCE


def test_frequencies_at_large_positions() -> None:
    """cos agrees with transformers up to position 131071 (float32 product of position and frequency)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from pace.models import rope
    from pace.models.spec import RopeSpec

    hf = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=131072)
    positions = torch.tensor([[0, 1, 63, 1000, 32768, 131071]])
    cos, _ = LlamaRotaryEmbedding(hf)(torch.zeros(1, dtype=torch.float32), positions)
    table = rope.build(RopeSpec(10000.0, 64, 131072, 131072), 131072)
    angle = positions[0].numpy().astype(np.float32)[:, None] * table.inv_freq
    # One unit in the last place of a frequency near 1 is 6e-8; times 131071 that is 0.008 rad.
    np.testing.assert_allclose(np.cos(angle.astype(np.float64)), cos[0, :, :32].numpy(), atol=0.02)
