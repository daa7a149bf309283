"""The decoder: one forward pass, written once, lowered into a `Plan`.

    x = embed(tokens)
    for each layer:
        x += o_proj(attention(rope(qkv_proj(norm(x)))))
        x += down_proj(act(gate_proj(norm(x))) * up_proj(norm(x)))
    logits = lm_head(norm(x))

Where the norms stand (`Placement`) is the business of two methods: `enter` makes the input of attention or MLP,
`leave` adds its result to the stream.

Fusions: q, k and v are one Gemm, gate and up one gated Gemm, the residual additions are epilogues, the append to
the KV cache belongs to the rotation. Behind the attention of the last layer that appends, only the rows that need
logits go on.

This file knows numbers and enums only; which architecture they came from is not visible here.
"""

from __future__ import annotations

from dataclasses import replace

from pace.errors import ConfigError
from pace.models import rope
from pace.models.plan import (
    Attention,
    Blocks,
    Dtype,
    Embed,
    ExpertsIn,
    ExpertsOut,
    Gemm,
    KVLayer,
    Norm,
    Op,
    PartName,
    Plan,
    RopeKV,
    Route,
    Rows,
    Select,
    Slot,
)
from pace.models.spec import AttentionSpec, Bias, DecoderSpec, DenseSpec, LearnedPositions, MoESpec, Placement

STEP = 16
"""Heads and the inner columns of MLPs are filled with zeros to a multiple of what the kernels read at once; every
activation of 0 is 0."""


def lower(spec: DecoderSpec, max_model_len: int, taps: tuple[int, ...] = ()) -> Plan:
    """Lower a decoder into a plan.

    Args:
        spec: the decoder.
        max_model_len: longest sequence of the engine (tokens); fixes dynamic and longrope tables.
        taps: depths at which every row's hidden state is kept, in bf16, in the slot `tap_slot(depth)`: 0 the embedding, i
            the stream behind i layers, the number of layers: behind the last norm, as transformers' `hidden_states`.

    Raises:
        ConfigError: max_model_len is not positive.
    """
    if max_model_len < 1:
        raise ConfigError(f"max_model_len is {max_model_len}, expected at least 1 token")
    model = _Lowering(spec, taps)
    x = model.embed()
    model.tap(0, x)
    inputs = model.layer_inputs(x)
    parallel = spec.placement is Placement.PARALLEL
    for i, layer in enumerate(spec.layers):
        h = model.enter(f"layers.{i}.attn", x)
        attended = model.attention(i, layer.mixer, h)
        if i == model.owners[-1] and not taps:  # nothing is appended from here on
            x, attended = model.select(x), model.select(attended)
            h = model.select(h) if parallel else h
            inputs = None if inputs is None else model.select(inputs)
        model.project_out(i, layer.mixer, attended, x)
        h = h if parallel else model.enter(f"layers.{i}.mlp", x)
        if isinstance(layer.ffn, MoESpec):
            model.experts(i, layer.ffn, h, x)
        else:
            model.mlp(i, layer.ffn, h, x)
        if inputs is not None:
            model.add_input(i, inputs, x)
        if i + 1 < len(spec.layers):
            model.tap(i + 1, x)
    logits = model.head(x)
    return Plan(
        slots=model.slots,
        ops=tuple(model.ops),
        ropes=rope.build_all(spec.ropes, max_model_len),
        kv=kv_layers(spec),
        vocab_size=spec.vocab_size,
        dim=spec.dim,
        logits=logits.name,
        hidden=model.hidden,
    )


def tap_slot(depth: int) -> str:
    """Where a plan that was lowered with this tap keeps its hidden states: bf16 [T, dim]."""
    return f"tap.{depth}"


def kv_layers(spec: DecoderSpec) -> tuple[KVLayer, ...]:
    """The layers that own keys and values. One keeps as many tokens as the farthest of its readers sees."""
    layers = []
    for owner in _owners(spec):
        mixers = [m for i, m in enumerate(_mixers(spec)) if i == owner or m.kv_from == owner]
        reaches = [min((n for n in (m.window, m.chunk) if n is not None), default=None) for m in mixers]
        reach = None if None in reaches else max(n for n in reaches if n is not None)
        layers.append(KVLayer(mixers[0].n_kv_heads, padded(mixers[0].head_dim), reach))
    return tuple(layers)


def padded(width: int) -> int:
    """Columns in the plan, of a head or between the halves of an MLP."""
    return -(-width // STEP) * STEP


def _mixers(spec: DecoderSpec) -> list[AttentionSpec]:
    return [layer.mixer for layer in spec.layers]


def _owners(spec: DecoderSpec) -> list[int]:
    """Layers with keys and values of their own, ascending."""
    return [i for i, mixer in enumerate(_mixers(spec)) if mixer.kv_from is None]


def _with_positions(embed: Embed, positions: LearnedPositions) -> Embed:
    return replace(embed, positions="positions", n_positions=positions.n, offset=positions.offset)


class _Lowering:
    """Collects operators and slots. Each method is one block of the decoder."""

    def __init__(self, spec: DecoderSpec, taps: tuple[int, ...] = ()) -> None:
        self.spec = spec
        self.taps = taps
        self.owners = _owners(spec)
        self.slots: dict[str, Slot] = {}
        self.hidden = ""  # behind the last norm
        self.ops: list[Op] = []

    def embed(self) -> Slot:
        """x = table[token] (+ positions), the residual stream: f32 [T, dim]."""
        spec = self.spec
        x = self.slot("x", spec.dim, "f32", "tokens")
        if spec.embed_dim is None:
            embed = Embed("embed", x.name, "embed", spec.embed_scale)
            self.ops.append(embed if spec.positions is None else _with_positions(embed, spec.positions))
            return x
        narrow = self.slot("embedded", spec.embed_dim, "bf16", "tokens")
        self.ops.append(Embed("embed", narrow.name, "embed", spec.embed_scale))
        self.ops.append(Gemm("embed.in", narrow.name, x.name, "embed.in"))
        if spec.positions is not None:
            self.ops.append(_with_positions(Embed("positions", x.name, None, add=True), spec.positions))
        return x

    def layer_inputs(self, x: Slot) -> Slot | None:
        """What each layer gets beside the stream: f32 [T, n_layers * per_layer_dim], or None.

        (norm(proj(x) / sqrt(dim)) + sqrt(per_layer_dim) * table[token]) / sqrt(2)
        """
        spec, width = self.spec, self.spec.per_layer_dim
        if width is None:
            return None
        n_layers = len(spec.layers)
        inputs = self.slot("inputs", n_layers * width, "f32", x.rows)
        h = self.cast("inputs.cast", x)
        self.ops += [
            Gemm("inputs.proj", h.name, inputs.name, "inputs.proj", scale=spec.dim**-0.5),
            Norm(
                "inputs.norm",
                inputs.name,
                inputs.name,
                "inputs.norm",
                kind=spec.norm.kind,
                eps=spec.norm.eps,
                groups=n_layers,
            ),
            Embed(
                "inputs.table", inputs.name, "inputs.table", width**0.5, add=True, post=0.5**0.5, mapped=True
            ),
        ]
        return inputs

    def attention(self, i: int, mixer: AttentionSpec, h: Slot) -> Slot:
        """attention(rope(qkv_proj(h))) of layer i: bf16 [rows, n_heads * head_dim]."""
        at, spec = f"layers.{i}", self.spec
        head_dim = padded(mixer.head_dim)
        kv = self.owners.index(i if mixer.kv_from is None else mixer.kv_from)
        rows = self.projected(mixer)
        qkv = self.slot("qkv", sum(r.n for r in rows), "f32", h.rows)
        bias = self.bias_of(Bias.QKV, f"{at}.qkv.bias")
        self.ops.append(Gemm(f"{at}.qkv", h.name, qkv.name, f"{at}.qkv", bias, blocks=rows))
        q = self.slot("q", mixer.n_heads * head_dim, "bf16", h.rows)
        norm, own = mixer.norm, mixer.kv_from is None
        weighted = norm is not None and norm.weight
        normed = norm is not None or mixer.v_norm
        self.ops.append(
            RopeKV(
                f"{at}.rope",
                qkv.name,
                q.name,
                mixer.n_heads,
                kv,
                rope=mixer.rope,
                append=own,
                k_is_v=mixer.k_is_v,
                qk_norm="none" if norm is None else norm.kind,
                q_norm=f"{at}.q_norm" if weighted else None,
                k_norm=f"{at}.k_norm" if weighted and own else None,
                norm_scope="head" if norm is None else norm.scope,
                norm_eps=spec.norm.eps if normed else 0.0,
                norm_width=mixer.head_dim if normed and mixer.head_dim != head_dim else None,
                norm_after_rope=norm is not None and norm.after_rope,
                v_norm=mixer.v_norm and own,
                temperature=mixer.temperature,
            )
        )
        attended = self.slot("attn", q.width, "bf16", h.rows)
        self.ops.append(
            Attention(
                f"{at}.attn",
                q.name,
                attended.name,
                mixer.n_heads,
                kv,
                spec.scale,
                window=mixer.window,
                chunk=mixer.chunk,
                softcap=spec.softcap,
                sinks=f"{at}.sinks" if mixer.sinks else None,
            )
        )
        return attended

    def projected(self, mixer: AttentionSpec) -> tuple[Blocks, ...]:
        """Rows of the fused projection: q | k | v, without what the layer does not have."""
        width, filled = mixer.head_dim, padded(mixer.head_dim)
        rows = [Blocks("q", mixer.n_heads, width, filled)]
        if mixer.kv_from is None:
            rows.append(Blocks("k", mixer.n_kv_heads, width, filled))
            if not mixer.k_is_v:
                rows.append(Blocks("v", mixer.n_kv_heads, width, filled))
        return tuple(rows)

    def project_out(self, i: int, mixer: AttentionSpec, attended: Slot, x: Slot) -> None:
        """x += o_proj(attended)."""
        columns = Blocks("all", mixer.n_heads, mixer.head_dim, padded(mixer.head_dim))
        bias = self.bias_of(Bias.OUT, f"layers.{i}.o.bias")
        self.leave(f"layers.{i}.o", f"layers.{i}.attn", attended, bias, x, columns)

    def mlp(self, i: int, ffn: DenseSpec, h: Slot, x: Slot) -> None:
        """x += down_proj(act(gate_proj(h)) * up_proj(h)), or without the gate."""
        inner = self.inner(i, "", ffn, h)
        bias = self.bias_of(Bias.MLP, f"layers.{i}.down.bias")
        columns = Blocks("all", 1, ffn.width, inner.width)
        self.leave(f"layers.{i}.down", f"layers.{i}.mlp", inner, bias, x, columns, self.last_scalar(i))

    def inner(self, i: int, which: str, ffn: DenseSpec, h: Slot) -> Slot:
        """act(gate_proj(h)) * up_proj(h) of an MLP of layer i: bf16 [rows, width]."""
        filled = padded(ffn.width)
        inner = self.slot("mlp", filled, "bf16", h.rows)
        parts: tuple[PartName, ...] = ("gate", "up") if ffn.gated else ("all",)
        name = f"layers.{i}.{which}" + ("gate_up" if ffn.gated else "up")
        self.ops.append(
            Gemm(
                name,
                h.name,
                inner.name,
                name,
                self.bias_of(Bias.MLP, f"{name}.bias"),
                epilogue="gated" if ffn.gated else "store",
                act=ffn.activation,
                blocks=tuple(Blocks(part, 1, ffn.width, filled) for part in parts),
            )
        )
        return inner

    def experts(self, i: int, ffn: MoESpec, h: Slot, x: Slot) -> None:
        """x += sum of weight_e * expert_e(h) over the chosen e, + shared(h)."""
        if ffn.dense is not None:
            self.mixed(i, ffn, ffn.dense, h, x)
            return
        route = self.route(i, ffn, h)
        scale = self.spec.residual_scale
        self.chosen(i, ffn, route, h, x, scale)
        if ffn.shared is not None:
            self.shared(i, ffn.shared, ffn.shared_gate, h, x)

    def shared(self, i: int, ffn: DenseSpec, gated: bool, h: Slot, x: Slot) -> None:
        """x += mlp(h), or x += sigmoid(gate(h)) * mlp(h)."""
        at = f"layers.{i}.shared"
        inner, gate = self.inner(i, "shared.", ffn, h), None
        if gated:
            gate = self.slot("gate", 1, "f32", h.rows).name
            self.ops.append(Gemm(f"{at}_gate", h.name, gate, f"{at}_gate", act="sigmoid"))
        self.ops.append(
            Gemm(
                f"{at}.down",
                inner.name,
                x.name,
                f"{at}.down",
                epilogue="add",
                scale=self.spec.residual_scale,
                other=gate,
                columns=Blocks("all", 1, ffn.width, inner.width),
            )
        )

    def mixed(self, i: int, ffn: MoESpec, dense: DenseSpec, h: Slot, x: Slot) -> None:
        """x += norm(norm(mlp(h)) + norm(experts(norm(x)))), times the layer's scalar."""
        at = f"layers.{i}"
        inner = self.inner(i, "", dense, h)
        y, z = (self.slot(name, x.width, "f32", x.rows) for name in ("y", "z"))
        columns = Blocks("all", 1, dense.width, inner.width)
        self.ops.append(Gemm(f"{at}.down", inner.name, y.name, f"{at}.down", columns=columns))
        self.norm(f"{at}.dense_post_norm", y, y)
        h = self.slot("h", x.width, "bf16", x.rows)
        self.norm(f"{at}.router.norm", x, h)
        route = self.route(i, ffn, h)
        self.norm(f"{at}.experts_norm", x, h)
        self.chosen(i, ffn, route, h, z, 1.0, add=False)
        self.norm(f"{at}.experts_post_norm", z, y, add=True)
        self.norm(f"{at}.mlp_post_norm", y, x, add=True, scalar=self.last_scalar(i))

    def route(self, i: int, ffn: MoESpec, h: Slot) -> Slot:
        """The experts that each row takes and their weights: f32 [rows, 2 * top_k]."""
        name, router = f"layers.{i}.router", ffn.router
        logits = self.slot("scores", ffn.n_experts, "f32", h.rows)
        route = self.slot("route", 2 * ffn.top_k, "f32", h.rows)
        bias = f"{name}.bias" if router.bias else None
        scale = self.spec.dim**-0.5 if router.own_norm else 1.0
        self.ops += [
            Gemm(name, h.name, logits.name, name, bias, scale=scale),
            Route(
                f"{name}.choose",
                logits.name,
                route.name,
                ffn.top_k,
                order=router.order,
                choice=f"{name}.choice" if router.choice else None,
                expert_scale=f"{name}.expert_scale" if router.own_norm else None,
                n_groups=router.n_groups,
                top_groups=router.top_groups,
                renormalise=router.renormalise,
                scale=router.scale,
            ),
        ]
        return route

    def chosen(
        self, i: int, ffn: MoESpec, route: Slot, h: Slot, dst: Slot, scale: float, add: bool = True
    ) -> None:
        """dst += scale * sum of weight_e * down_e(act(gate_e(h)) * up_e(h)); without `add`, dst = that."""
        at, filled = f"layers.{i}.experts", padded(ffn.width)
        inner = self.slot("experts", filled, "bf16", h.rows, ffn.top_k)
        alpha, limit = ffn.clamp or (0.0, 0.0)
        self.ops += [
            ExpertsIn(
                f"{at}.gate_up",
                h.name,
                inner.name,
                route.name,
                f"{at}.gate_up",
                ffn.n_experts,
                ffn.width,
                bias=f"{at}.gate_up.bias" if ffn.bias else None,
                act=ffn.activation,
                alpha=alpha,
                limit=limit,
                on_input=ffn.on_input,
                format=ffn.format,
            ),
            ExpertsOut(
                f"{at}.down",
                inner.name,
                dst.name,
                route.name,
                f"{at}.down",
                ffn.n_experts,
                columns=Blocks("all", 1, ffn.width, filled),
                bias=f"{at}.down.bias" if ffn.bias else None,
                scale=scale,
                add=add,
                weigh=not ffn.on_input,
                format=ffn.format,
            ),
        ]

    def last_scalar(self, i: int) -> str | None:
        """The layer's scalar, where the feed-forward is the last that adds to the stream."""
        return (
            f"layers.{i}.scalar" if self.spec.layers[i].scalar and self.spec.per_layer_dim is None else None
        )

    def add_input(self, i: int, inputs: Slot, x: Slot) -> None:
        """x += norm(out(act(gate(x)) * input_i)), times the layer's scalar."""
        at, width = f"layers.{i}", self.spec.per_layer_dim or 0
        h = self.cast(f"{at}.input_cast", x)
        gated = self.slot("input", width, "bf16", x.rows)
        y = self.slot("y", x.width, "f32", x.rows)
        act = self.spec.layers[i].ffn.activation
        self.ops += [
            Gemm(
                f"{at}.input_gate",
                h.name,
                gated.name,
                f"{at}.input_gate",
                epilogue="mul",
                act=act,
                other=inputs.name,
                at=i * width,
            ),
            Gemm(f"{at}.input_out", gated.name, y.name, f"{at}.input_out"),
        ]
        scalar = f"{at}.scalar" if self.spec.layers[i].scalar else None
        self.norm(f"{at}.input_norm", y, x, add=True, scalar=scalar)

    def head(self, x: Slot) -> Slot:
        """logits = lm_head(norm(x)): f32 [R, vocab_size]; a tied head shares the embedding's matrix."""
        spec = self.spec
        last = len(spec.layers)
        name = tap_slot(last) if last in self.taps else "h"
        h = self.slot(name, x.width, "bf16", x.rows)
        if spec.final_norm:
            self.norm("norm", x, h)
        else:
            self.ops.append(Norm("norm", x.name, h.name, None, kind="none"))
        if x.rows == "tokens":
            h = self.select(h)
        self.hidden = h.name
        if spec.embed_dim is not None:
            narrow = self.slot("unembedded", spec.embed_dim, "bf16", h.rows)
            self.ops.append(Gemm("embed.out", h.name, narrow.name, "embed.out"))
            h = narrow
        logits = self.slot("logits", spec.vocab_size, "f32", h.rows)
        weight = "embed" if spec.tied else "lm_head"
        bias = self.bias_of(Bias.HEAD, "lm_head.bias")
        self.ops.append(
            Gemm("lm_head", h.name, logits.name, weight, bias, scale=spec.logit_scale, cap=spec.logit_cap)
        )
        return logits

    def enter(self, name: str, x: Slot) -> Slot:
        """The input of attention or MLP, bf16: norm(x), or x where the norm stands behind."""
        if self.spec.placement in (Placement.POST, Placement.STREAM):
            return self.cast(f"{name}_cast", x)
        h = self.slot("h", x.width, "bf16", x.rows)
        self.norm(f"{name}_norm", x, h)
        return h

    def leave(
        self,
        name: str,
        half: str,
        src: Slot,
        bias: str | None,
        x: Slot,
        columns: Blocks,
        scalar: str | None = None,
    ) -> None:
        """x += proj(src), through a norm where one stands behind; then times the layer's scalar."""
        spec = self.spec
        if spec.placement in (Placement.POST, Placement.SANDWICH):
            y = self.slot("y", x.width, "f32", x.rows)
            self.ops.append(Gemm(name, src.name, y.name, name, bias, columns=columns))
            self.norm(f"{half}_post_norm", y, x, add=True, scalar=scalar)
            return
        self.ops.append(
            Gemm(
                name, src.name, x.name, name, bias, epilogue="add", scale=spec.residual_scale, columns=columns
            )
        )
        if spec.placement is Placement.STREAM:
            self.norm(f"{half}_norm", x, x)

    def norm(self, name: str, src: Slot, dst: Slot, add: bool = False, scalar: str | None = None) -> None:
        """dst = norm(src), or dst = scalar * (dst + norm(src))."""
        norm = self.spec.norm
        self.ops.append(
            Norm(
                name,
                src.name,
                dst.name,
                name if norm.weight else None,
                f"{name}.bias" if norm.bias else None,
                kind=norm.kind,
                eps=norm.eps,
                add=add,
                scale=scalar,
            )
        )

    def tap(self, depth: int, x: Slot) -> None:
        """Keep the hidden states, where that was asked for."""
        if depth in self.taps:
            kept = self.slot(tap_slot(depth), x.width, "bf16", x.rows)
            self.ops.append(Norm(f"tap.{depth}", x.name, kept.name, None, kind="none"))

    def cast(self, name: str, x: Slot) -> Slot:
        """x as the input of a Gemm: bf16."""
        h = self.slot("h", x.width, "bf16", x.rows)
        self.ops.append(Norm(name, x.name, h.name, None, kind="none"))
        return h

    def select(self, src: Slot) -> Slot:
        """The rows of `src` that need logits."""
        dst = self.slot(src.name, src.width, src.dtype, "logits")
        self.ops.append(Select(f"select.{src.name}", src.name, dst.name))
        return dst

    def bias_of(self, which: Bias, name: str) -> str | None:
        """The bias's weight name if the decoder has it."""
        return name if which in self.spec.bias else None

    def slot(self, name: str, width: int, dtype: Dtype, rows: Rows, times: int = 1) -> Slot:
        """The slot of that name, row set and width; layers reuse each other's."""
        if rows == "logits" and name != "logits":
            name = f"{name}.out"
        slot = Slot(name, width, dtype, rows, times)
        found = self.slots.setdefault(name, slot)
        if found.width != width or found.times != times:  # layers of several shapes
            slot = replace(slot, name=f"{name}.{width}" + (f"x{times}" if times > 1 else ""))
            found = self.slots.setdefault(slot.name, slot)
        return found
