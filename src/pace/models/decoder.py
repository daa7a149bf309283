"""The decoder: one forward pass, written once, lowered into a `Plan`.

    x = embed(tokens)
    for each layer:
        x += o_proj(attention(rope(qkv_proj(norm(x)))))
        x += down_proj(act(gate_proj(norm(x))) * up_proj(norm(x)))
    logits = lm_head(norm(x))

Fusions: q, k and v are one Gemm, gate and up one gated Gemm, the residual additions are epilogues, the
append to the KV cache belongs to the rotation. After the last layer's attention only the rows that need
logits go on.

This file knows numbers and enums only; which architecture they came from is not visible here.
"""

from __future__ import annotations

from pace.errors import ConfigError
from pace.models import rope
from pace.models.plan import (
    Attention,
    Dtype,
    Embed,
    Gemm,
    KVLayer,
    Norm,
    Op,
    Plan,
    RopeKV,
    Rows,
    Select,
    Slot,
)
from pace.models.spec import Bias, DecoderSpec, QKNorm


def lower(spec: DecoderSpec, max_model_len: int) -> Plan:
    """Lower a decoder into a plan.

    Args:
        spec: the decoder.
        max_model_len: longest sequence of the engine (tokens); fixes dynamic and longrope tables.

    Raises:
        ConfigError: max_model_len is not positive.
    """
    if max_model_len < 1:
        raise ConfigError(f"max_model_len is {max_model_len}, expected at least 1 token")
    model = _Lowering(spec)
    x = model.embed()
    for i in range(len(spec.layers)):
        attended = model.attention(i, x)
        if i == len(spec.layers) - 1:
            x, attended = model.select(x), model.select(attended)
        model.project_out(i, attended, x)
        model.mlp(i, x)
    logits = model.head(x)
    return Plan(
        slots=model.slots,
        ops=tuple(model.ops),
        ropes=tuple(rope.build(r, max_model_len) for r in spec.ropes),
        kv=tuple(KVLayer(spec.n_kv_heads, spec.head_dim, layer.window) for layer in spec.layers),
        vocab_size=spec.vocab_size,
        dim=spec.dim,
        logits=logits.name,
    )


class _Lowering:
    """Collects operators and slots. Each method is one block of the decoder."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.slots: dict[str, Slot] = {}
        self.ops: list[Op] = []

    def embed(self) -> Slot:
        """x = table[token], the residual stream: f32 [T, dim]."""
        x = self.slot("x", self.spec.dim, "f32", "tokens")
        self.ops.append(Embed("embed", x.name, "embed"))
        return x

    def attention(self, i: int, x: Slot) -> Slot:
        """attention(rope(qkv_proj(norm(x)))) of layer i: bf16 [T, n_heads * head_dim]."""
        spec, layer, at = self.spec, self.spec.layers[i], f"layers.{i}"
        h = self.norm(f"{at}.attn_norm", x)
        qkv = self.slot("qkv", spec.q_dim + 2 * spec.kv_dim, "f32", x.rows)
        self.ops.append(
            Gemm(f"{at}.qkv", h.name, qkv.name, f"{at}.qkv", self.bias_of(Bias.QKV, f"{at}.qkv.bias"))
        )
        q = self.slot("q", spec.q_dim, "bf16", x.rows)
        head_norm = spec.qk_norm is QKNorm.HEAD
        self.ops.append(
            RopeKV(
                f"{at}.rope",
                qkv.name,
                q.name,
                spec.n_heads,
                kv=i,
                rope=layer.rope,
                qk_norm="rms" if head_norm else "none",
                q_norm=f"{at}.q_norm" if head_norm else None,
                k_norm=f"{at}.k_norm" if head_norm else None,
                norm_eps=spec.norm_eps if head_norm else 0.0,
            )
        )
        attended = self.slot("attn", spec.q_dim, "bf16", x.rows)
        scale = spec.head_dim**-0.5
        self.ops.append(
            Attention(f"{at}.attn", q.name, attended.name, spec.n_heads, i, scale, window=layer.window)
        )
        return attended

    def project_out(self, i: int, attended: Slot, x: Slot) -> None:
        """x += o_proj(attended)."""
        name = f"layers.{i}.o"
        bias = self.bias_of(Bias.OUT, f"{name}.bias")
        self.ops.append(Gemm(name, attended.name, x.name, name, bias, epilogue="add"))

    def mlp(self, i: int, x: Slot) -> None:
        """x += down_proj(act(gate_proj(norm(x))) * up_proj(norm(x)))."""
        spec, at = self.spec, f"layers.{i}"
        h = self.norm(f"{at}.mlp_norm", x)
        inner = self.slot("mlp", spec.intermediate_dim, "bf16", x.rows)
        self.ops.append(
            Gemm(
                f"{at}.gate_up",
                h.name,
                inner.name,
                f"{at}.gate_up",
                self.bias_of(Bias.MLP, f"{at}.gate_up.bias"),
                epilogue="gated",
                act=spec.activation,
            )
        )
        bias = self.bias_of(Bias.MLP, f"{at}.down.bias")
        self.ops.append(Gemm(f"{at}.down", inner.name, x.name, f"{at}.down", bias, epilogue="add"))

    def head(self, x: Slot) -> Slot:
        """logits = lm_head(norm(x)): f32 [R, vocab_size]; a tied head shares the embedding's matrix."""
        h = self.norm("norm", x)
        logits = self.slot("logits", self.spec.vocab_size, "f32", x.rows)
        self.ops.append(Gemm("lm_head", h.name, logits.name, "embed" if self.spec.tied else "lm_head"))
        return logits

    def norm(self, name: str, x: Slot) -> Slot:
        """norm(x) as the input of a Gemm: bf16, the width of x."""
        h = self.slot("h", x.width, "bf16", x.rows)
        self.ops.append(Norm(name, x.name, h.name, name, eps=self.spec.norm_eps))
        return h

    def select(self, src: Slot) -> Slot:
        """The rows of `src` that need logits."""
        dst = self.slot(src.name, src.width, src.dtype, "logits")
        self.ops.append(Select(f"select.{src.name}", src.name, dst.name))
        return dst

    def bias_of(self, which: Bias, name: str) -> str | None:
        """The bias's weight name if the decoder has it."""
        return name if which in self.spec.bias else None

    def slot(self, name: str, width: int, dtype: Dtype, rows: Rows) -> Slot:
        """The slot of that name and row set; layers reuse each other's."""
        if rows == "logits" and name != "logits":
            name = f"{name}.out"
        return self.slots.setdefault(name, Slot(name, width, dtype, rows))
