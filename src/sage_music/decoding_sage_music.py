"""The decode step: one forward pass over a few new tokens without the cost of modules.

At one token the arithmetic of a small model takes less time than calling its modules one by one. `DecodeStep` runs the
same operations on the same parameters in one function. `generate()` hangs one on the cache it builds; everything else
(training, prefill, hooks, outputs of layers) goes through the modules.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .attention_sage_music import FEW_TOKENS, AttributePlan
from .cache_sage_music import CompactLayer


def _is_plain(*modules: nn.Module) -> bool:
    """Whether these are `nn.Linear` in float32 without a bias, and nobody listens to them."""
    return all(
        type(module) is nn.Linear
        and module.bias is None
        and module.weight.dtype == torch.float32
        and not (module._forward_hooks or module._forward_pre_hooks)
        for module in modules
    )


def _call(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`module` as a function, without the cost of calling it where nobody listens."""
    return module if module._forward_hooks or module._forward_pre_hooks else module.forward


def _product(states: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None = None, then: str = "none"):
    """`states @ weight.T`, and then "swish", or "add" or "mul" of `other`; states (rows, in), weight (out, in).

    With few rows this is the bulk of a step, and bound by how fast the weight is read. oneDNN reads a large one at
    about twice the speed of `F.linear` (MKL); compiled, for one row, it is a plain sum, which runs at the memory's own.
    """
    if torch.compiler.is_compiling():
        output = (weight * states).sum(-1)[None]
        if then == "swish":
            return F.silu(output)
        return output if other is None else output + other if then == "add" else output * other
    if other is None:
        return torch.ops.mkldnn._linear_pointwise.default(states, weight, None, then, [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(states, other, weight, None, then)


def _projection(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """(rows, in) to (rows, out)."""
    return (lambda states: _product(states, module.weight)) if _is_plain(module) else _call(module)


def _residual(module: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(rows, in) and what to add to (rows, out)."""
    if _is_plain(module):
        return lambda states, residual: _product(states, module.weight, residual, "add")
    call = _call(module)
    return lambda states, residual: call(states) + residual


def _gated(mlp: nn.Module, activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """(rows, in): `act(gate(x)) * up(x)`."""
    gate, up, act = mlp.gate_proj, mlp.up_proj, _call(mlp.act_fn)
    if not _is_plain(gate, up):
        gate, up = _call(gate), _call(up)
        return lambda states: act(gate(states)) * up(states)
    if activation in ("silu", "swish"):
        return lambda states: _product(states, up.weight, _product(states, gate.weight, then="swish"), "mul")
    return lambda states: _product(states, up.weight, act(_product(states, gate.weight)), "mul")


class DecodeStep:
    """Forward passes of a `kv_routing="head"` model over up to `FEW_TOKENS` tokens on top of a `SageMusicCache`.

    Holds the modules, not copies of their weights; `of` makes a new one when modules have been replaced.

    Args:
        model: a `SageMusicModel`.
        compile_options: arguments of `torch.compile`; the layers then run as one compiled function for a lone token,
            whatever the length of the cache. Several tokens at a time gain nothing by it.
    """

    def __init__(self, model: nn.Module, compile_options: dict | None = None):
        config = model.config
        self.model, self.compile_options = model, compile_options
        self.head_dim, self.half, self.kv_heads = config.head_dim, config.head_dim // 2, config.num_key_value_heads
        self.fold = model.layers[0].self_attn.fold
        self.scaling, self.eps, self.shape = self.head_dim**-0.5, config.rms_norm_eps, (config.hidden_size,)
        self.layers = []
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            products = (
                _projection(attention.q_proj),
                _residual(attention.o_proj),
                _gated(mlp, config.hidden_act),
                _residual(mlp.down_proj),
            )
            self.layers.append((layer.input_layernorm, attention, layer.post_attention_layernorm, *products))
        self.compiled = None if compile_options is None else torch.compile(self.run, **compile_options)
        self.signature = self.sign(model)

    @staticmethod
    def sign(model: nn.Module) -> list[tuple[int, bool]]:
        """What a step depends on: which modules there are, and whether somebody listens to them."""
        return [(id(module), bool(module._forward_hooks or module._forward_pre_hooks)) for module in model.modules()]

    @classmethod
    def of(cls, model: nn.Module, old: "DecodeStep | None", compile_options: dict | None) -> "DecodeStep | None":
        """The step for a `SageMusicModel`: `old` where it still fits, since compiling takes seconds; `None` where the
        model has to run by its modules (another routing, attention, device or half precision; hooks on whole layers).
        """
        config = model.config
        if config.kv_routing != "head" or config._attn_implementation != "sdpa" or model.device.type != "cpu":
            return None
        if model.dtype not in (torch.float32, torch.float64) or not torch.backends.mkldnn.is_available():
            return None
        wholes = [model, model.embed_tokens, model.norm, model.rotary_emb]
        for layer in model.layers:
            wholes += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        if any(module._forward_hooks or module._forward_pre_hooks for module in wholes):
            return None
        if old is not None and old.compile_options == compile_options and old.signature == cls.sign(model):
            return old
        return cls(model, compile_options)

    def takes(self, input_ids: torch.Tensor | None, cache, kwargs: dict) -> bool:
        """Whether this pass is one for the decode step."""
        return (
            input_ids is not None
            and input_ids.shape[1] <= FEW_TOKENS
            and cache.lengths is not None
            and not torch.is_grad_enabled()
            and not (kwargs.get("output_hidden_states") or kwargs.get("output_attentions"))
        )

    def __call__(self, input_ids, attention_mask, position_ids, cache) -> torch.Tensor:
        """Final-norm hidden states (B, T, hidden_size) of `input_ids` (B, T); writes the cache."""
        model = self.model
        model._check_ids(input_ids)
        states = F.embedding(input_ids, model.embed_tokens.weight)
        if position_ids is None:
            seen = cache.get_seq_length()
            position_ids = model._positions(attention_mask, seen, input_ids.shape[1], input_ids.device)
        plan = model._plan(input_ids, None, states, attention_mask, position_ids, cache)
        cos, sin = model.rotary_emb(states, position_ids)
        route = plan.route
        for layer in cache.layers:
            layer.reserve(route.length)
        buffers = [layer.buffer for layer in cache.layers]
        rows = route.flat_rows(self.kv_heads, buffers[0].shape[3])
        bias = route.bias(self.kv_heads, self.fold.width, states.dtype)
        if self.compiled is not None and input_ids.numel() == 1:
            try:
                return self.compiled(states, plan.attribute_ids, None, cos, sin, rows, bias, buffers)
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                warnings.warn(f"decoding goes on uncompiled, torch.compile having failed: {reason}", stacklevel=2)
                self.compiled = None
        return self.run(states, plan.attribute_ids, plan.attribute, cos, sin, rows, bias, buffers)

    def run(self, states, attribute_ids, attribute, cos, sin, rows, bias, buffers) -> torch.Tensor:
        """The layers: states (B, T, hidden_size), tables (B or 1, T, 1, d), `rows` and `bias` as `AttributeRoute` gives
        them, a buffer a layer, written in place. Nothing here depends on the host knowing a value."""
        batch, length, width = states.shape
        head_dim, half, groups, used = self.head_dim, self.half, self.fold.width, bias.shape[-1]
        plan = AttributePlan(attribute_ids, attribute)
        # The same tables for keys and values in one go: values stand still.
        kv_cos = torch.stack((cos, torch.ones_like(cos)), dim=2)  # (B, T, 2, 1, d)
        kv_sin = torch.stack((sin, torch.zeros_like(sin)), dim=2)
        in_place = length == 1 and self.fold.even
        lone = batch * length == 1 and not torch.compiler.is_compiling()
        norm_rows = self._norm_one if lone else self._norm
        states = states.view(-1, width)
        for parts, buffer in zip(self.layers, buffers, strict=True):
            norm, attention, next_norm, query_of, add_mixed, gated, add_gated = parts
            normed = norm_rows(states, norm.weight)
            query = query_of(normed).view(batch, length, -1, head_dim)
            query = torch.addcmul(query * cos, query.roll(half, -1), sin)
            kv = attention.project_kv(normed.view(batch, length, width), plan)  # (B, T, 2, h, d)
            kv = torch.addcmul(kv * kv_cos, kv.roll(half, -1), kv_sin)
            CompactLayer.write(buffer, kv.permute(2, 0, 3, 1, 4), rows)

            keys, values = buffer.flatten(1, 2)[:, :, :used]  # (B * A * h, S, d) each
            if in_place:
                query = query.view(-1, groups, head_dim)
            else:
                query = self.fold.fold(query.transpose(1, 2)).reshape(-1, groups * length, head_dim)
            scores = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=self.scaling)
            mixed = torch.bmm(scores.softmax(-1), values)
            if not in_place:
                mixed = self.fold.unfold(mixed.view(batch, -1, groups, length, head_dim)).transpose(1, 2)
            states = add_mixed(mixed.reshape(batch * length, -1), states)

            normed = norm_rows(states, next_norm.weight)
            states = add_gated(gated(normed), states)
        return norm_rows(states, self.model.norm.weight).view(batch, length, width)

    def _norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, self.shape, weight, self.eps)

    def _norm_one(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of one row (1, hidden_size): its square sum as a number costs less than the general kernel."""
        row = states.view(-1)
        return (states * weight).mul_((float(row.dot(row)) / self.shape[0] + self.eps) ** -0.5)


__all__ = ["DecodeStep"]
