"""docs/models.md, written from the registry, the cases of tests/golden/families.py and what was measured with them.

    python tests/models/catalogue.py

`tests/golden/make.py` measures (errors.json); a test fails when the page is stale.
"""

from __future__ import annotations

import inspect
import io
import json
import sys
import tokenize
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import families

from pace.engine.memory import packed_bytes, read_bytes
from pace.models.config import Config
from pace.models.decoder import lower
from pace.models.registry import ARCHITECTURES, Architecture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

SERVES = {
    "LlamaForCausalLM": "Llama 1 to 3.3, DeepSeek-R1-Distill-Llama, Sarvam-1 and 2B, SmolLM 1 and 2, open_llama, Yi",
    "MistralForCausalLM": "Mistral 7B, Nemo, Small; Sarvam-M; Zephyr",
    "MinistralForCausalLM": "Ministral 8B",
    "Ministral3ForCausalLM": "Ministral 3 (text)",
    "Mistral3ForConditionalGeneration": "Mistral Small 3.1 and 3.2, Ministral 3 (text tower)",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "Qwen3ForCausalLM": "Qwen3 0.6B to 32B",
    "Gemma2ForCausalLM": "Gemma 2 2B, 9B, 27B",
    "Gemma3ForCausalLM": "Gemma 3 270M, 1B, text exports of the larger ones",
    "Gemma3ForConditionalGeneration": "Gemma 3 4B, 12B, 27B (text tower)",
    "Gemma4ForCausalLM": "Gemma 4 E2B, E4B, 31B, 26B-A4B (text exports)",
    "Gemma4ForConditionalGeneration": "Gemma 4 E2B, E4B, 31B, 26B-A4B (text tower)",
    "Gemma4UnifiedForCausalLM": "Gemma 4 12B (text export)",
    "Gemma4UnifiedForConditionalGeneration": "Gemma 4 12B (text tower)",
    "PhiForCausalLM": "Phi-1, Phi-1.5, Phi-2",
    "Phi3ForCausalLM": "Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini, Phi-4-reasoning",
    "OPTForCausalLM": "OPT 125m to 66b, Galactica",
    "GPTJForCausalLM": "GPT-J 6B",
    "Olmo2ForCausalLM": "OLMo 2 1B to 32B",
    "Olmo3ForCausalLM": "OLMo 3 7B and 32B",
    "GraniteForCausalLM": "Granite 3.0 to 3.3, Granite 4.1 (dense)",
    "SmolLM3ForCausalLM": "SmolLM3 3B",
    "StableLmForCausalLM": "StableLM 3B, StableLM 2 1.6B and 12B",
    "HunYuanDenseV1ForCausalLM": "HunYuan 0.5B to 7B (dense)",
    "SeedOssForCausalLM": "Seed-OSS 36B",
    "Exaone4ForCausalLM": "EXAONE 4.0 1.2B and 32B",
    "Glm4ForCausalLM": "GLM-4-0414 9B and 32B, GLM-Z1",
    "Ernie4_5ForCausalLM": "ERNIE 4.5 0.3B",
    "Cohere2ForCausalLM": "Command R7B, Command A",
    "Qwen2MoeForCausalLM": "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    "Qwen3MoeForCausalLM": "Qwen3-30B-A3B, 235B-A22B, Coder",
    "MixtralForCausalLM": "Mixtral 8x7B, 8x22B",
    "GptOssForCausalLM": "gpt-oss 20b and 120b, in MXFP4 or bf16",
    "Llama4ForCausalLM": "Llama 4 Scout, Maverick (text exports)",
    "Llama4ForConditionalGeneration": "Llama 4 Scout, Maverick (text tower)",
    "Glm4MoeForCausalLM": "GLM-4.5, 4.6 and Air",
    "SarvamMoEForCausalLM": "Sarvam-30B",
    "OlmoeForCausalLM": "OLMoE 1B-7B",
    "GraniteMoeForCausalLM": "Granite 3.0 and 3.1 1B-A400M, 3B-A800M",
    "MiniMaxM2ForCausalLM": "MiniMax-M2, dequantised",
}
"""The checkpoints that each architecture is known for."""

HEAD = """# Models

Written by `python tests/models/catalogue.py` from the registry, the test cases and what was measured with them.

An architecture is what `config.json` calls it. A checkpoint loads under its own tensor names, in BF16, F16 or F32, single
or sharded, or quantised ([quantisation.md](quantisation.md)); nothing is converted beforehand. Of multimodal files the
text model runs, and an image in a request is refused by name. Heads may have any even width up to 512 columns, MLPs and
residual streams any width.

## Architectures
"""

CHECKS = """
## How each was checked

Every architecture has three or more checkpoints of random weights, which together flip every option that it reads, with
odd widths and prompts longer than the windows (`tests/golden/families.py`). transformers loads the same files strictly.
Compared are

- the float64 reference with transformers in float32, at every position (some rows of the logits are stored and compared on
  every machine);
- the compiled executor with the reference, at every position: the tolerance is what rounding to bf16 explains, or twice
  what the reference itself loses when it rounds at the same places;
- the executor with itself, byte for byte: prompts whole, by the token, in chunks, in company, on paged, slab and
  contiguous caches;
- every value of every config: one that is altered changes the logits or is refused.

Where rounding chooses between experts that are nearly as good, the reference follows the executor's choice, and the test
says how near they were.

Errors are max |difference| / max |logit|, of the case that is nearest to its tolerance. Greedy agreement is the share of
positions where the executor's best token is transformers'; where it is not, the two best are closer than the tolerance.
"""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss-20b": ("GptOssForCausalLM", {
        "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        "quantization_config": {"quant_method": "mxfp4"},
    }),
    "gpt-oss-120b": ("GptOssForCausalLM", {
        "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4, "vocab_size": 201088,
        "quantization_config": {"quant_method": "mxfp4"},
    }),
    "Qwen3-30B-A3B": ("Qwen3MoeForCausalLM", {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    }),
    "Qwen1.5-MoE-A2.7B": ("Qwen2MoeForCausalLM", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts": 60, "num_experts_per_tok": 4, "vocab_size": 151936,
    }),
    "Mixtral-8x7B": ("MixtralForCausalLM", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    }),
    "Llama-4-Scout": ("Llama4ForCausalLM", {
        "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 8192, "num_local_experts": 16, "num_experts_per_tok": 1, "vocab_size": 202048,
    }),
    "Llama-4-Maverick": ("Llama4ForCausalLM", {
        "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 8192, "num_local_experts": 128, "num_experts_per_tok": 1, "vocab_size": 202048,
        "interleave_moe_layer_step": 2, "use_qk_norm": False,
    }),
    "Gemma-4-26B-A4B": ("Gemma4ForCausalLM", {
        "hidden_size": 2816, "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 2, "attention_k_eq_v": True, "intermediate_size": 2112, "head_dim": 256,
        "moe_intermediate_size": 704, "num_experts": 128, "top_k_experts": 8, "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
    }),
    "Sarvam-30B": ("SarvamMoEForCausalLM", {
        "hidden_size": 4096, "num_hidden_layers": 19, "num_attention_heads": 64, "num_key_value_heads": 4,
        "intermediate_size": 8192, "moe_intermediate_size": 1024, "num_experts": 128, "num_experts_per_tok": 6,
        "vocab_size": 262144,
    }),
    "OLMoE-1B-7B": ("OlmoeForCausalLM", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
    }),
    "GLM-4.5-Air": ("Glm4MoeForCausalLM", {
        "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151552,
    }),
}  # fmt: skip
"""Checkpoints with experts, as far as their shapes go."""

RULES = """
## What is read, and what is refused

A key of `config.json` that changes the mathematics is computed or refused, never ignored: a family relaxes a key by
reading it, for itself alone. Absent and null mean the family's default, which differs (base of the rotation, tied heads,
width of a head). Refused by name: latent attention, Gemma 3n's blocks, indexers, linear attention, Mamba, Phi's
`qk_layernorm`, attention in both directions, quantised files but MXFP4 experts. [refusals.md](refusals.md) has the rest.

- RoPE: default, linear, dynamic, llama3 (also with equal factors), yarn, longrope (also as `su`, and `yarn` in Phi-3),
  proportional, a fixed `alpha`; whole heads or a part, halves or neighbouring columns, one set for all layers or one per
  kind. Dynamic and longrope tables are chosen once, by the longest sequence of the engine.
- A file with a LM head of its own settles whether the head is tied.
- Experts: a tensor for each (`gate_proj`, `up_proj`, `down_proj`, or `w1`, `w3`, `w2`), one for all with rows or with
  columns first, or MXFP4 blocks and scales, layer by layer whichever the file has.
- `pytorch_model.bin` is not read; the error says how to convert it.
"""


def options(name: str, architecture: Architecture) -> list[str]:
    """Keys that the family reads, over its cases."""
    read: set[str] = set()
    for case in families.CASES.values():
        if case.config["architectures"] == [name]:
            config = Config(case.config)
            architecture.spec(config)
            read |= config.read
    return sorted(read)


def lines(architecture: Architecture) -> int:
    """Lines of code in the family's file, without blank ones, comments and docstrings, shared by its architectures."""
    source = inspect.getsourcefile(architecture.spec) or ""
    shared = sum(1 for a in ARCHITECTURES.values() if inspect.getsourcefile(a.spec) == source)
    return -(-len(code_lines(Path(source).read_text())) // shared)


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code."""
    found: set[int] = set()
    line_starts = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            line_starts = line_starts or token.type == tokenize.NEWLINE
        elif token.type not in (tokenize.COMMENT, tokenize.ENDMARKER):
            if not (line_starts and token.type == tokenize.STRING):
                found.update(range(token.start[0], token.end[0] + 1))
            line_starts = False
    return found


def measurements() -> dict[str, Any]:
    """What make.py measured."""
    found: dict[str, Any] = json.loads(families.ERRORS_FILE.read_text())
    return found


def render() -> str:
    """The page."""
    errors = measurements()
    out = [HEAD, "| architecture | `model_type` | checkpoints | lines |", "|---|---|---|---|"]
    for name, a in ARCHITECTURES.items():
        count = "the text model's" if a.text else str(lines(a))
        out.append(f"| `{name}` | `{a.model_type}` | {SERVES[name]} | {count} |")
    out += ["", "Lines: code of the family's file, divided by its architectures."]
    out += [CHECKS, f"Measured on tier `{errors['tier']}` with {errors['versions']}.", ""]
    out += [
        "| architecture | cases | reference | executor | tolerance | greedy agreement |",
        "|---|---|---|---|---|---|",
    ]
    for name in ARCHITECTURES:
        rows = [
            errors["cases"][c] for c, case in families.CASES.items() if case.config["architectures"] == [name]
        ]
        worst = max(rows, key=lambda row: float(row["executor"]) / float(row["tolerance"]))
        reference = max(float(row["reference"]) for row in rows)
        agree = sum(row["agree"] for row in rows) / sum(row["positions"] for row in rows)
        measured = f"{worst['executor']:.4f} | {worst['tolerance']:.4f} | {agree:.1%}"
        out.append(f"| `{name}` | {len(rows)} | {reference:.1e} | {measured} |")
    out += ["", "## What a step of experts reads", "", *experts_table()]
    out += [
        RULES,
        "## Options covered",
        "",
        "| architecture | keys of `config.json` that it reads |",
        "|---|---|",
    ]
    for name, a in ARCHITECTURES.items():
        if not a.text:
            out.append(f"| `{name}` | {', '.join(f'`{key}`' for key in options(name, a))} |")
    return "\n".join(out) + "\n"


def experts_table() -> list[str]:
    """Weights in memory, and what one sequence's step reads of them: its experts and all else but the embedding."""
    out = [
        "Weights in memory, and the part of them that a step of one sequence reads: the experts that its row takes, and",
        "all that is no expert. A step of more rows reads every expert that one of them takes, once.",
        "",
        "| checkpoint | weights | read by a step | share |",
        "|---|---|---|---|",
    ]
    for name, (architecture, shape) in SHAPES.items():
        a = ARCHITECTURES[architecture]
        config = {
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False,
        } | shape  # fmt: skip
        plan = lower(a.spec(Config(config)), 1)
        held, read = packed_bytes(plan), read_bytes(plan)
        out.append(f"| {name} | {held / 1e9:.1f} GB | {read / 1e9:.2f} GB | {read / held:.0%} |")
    out += [
        "",
        "Loading takes little beside: with gpt-oss-20b the process peaks at 14.9 GB, 1.08 times its weights,",
        "with activations and the mapped pages of what is being read. ARCHITECTURE.md says what steps reach of the roofs.",
    ]
    return out


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"{PAGE}: {len(render().splitlines())} lines")
