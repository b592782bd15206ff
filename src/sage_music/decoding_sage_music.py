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

from .arguments_sage_music import PACKING
from .attention_sage_music import FEW_TOKENS, AttributePlan, norm_heads
from .cache_sage_music import CompactLayer

# Weights of up to so many elements are multiplied in a layout of their own: 2 MB in float32.
SMALL_WEIGHT = 2**19


def _is_heard(module: nn.Module) -> bool:
    """Whether somebody listens to this module by a hook, or has put a `forward` on it, as Accelerate does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_own(module: nn.Module, model: nn.Module) -> bool:
    """Whether this is a module of PyTorch's or of the model's own package, whose weights are what they seem: not one of
    PEFT's around it, or a parametrized one, which compute other weights in their `forward`."""
    package = type(module).__module__.rpartition(".")[0]
    return package in ("torch.nn.modules", type(model).__module__.rpartition(".")[0])


def _is_plain(module: nn.Module) -> bool:
    """Whether this is an `nn.Linear` in float32, stored row by row, without a bias, and nobody listens to it."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and module.weight.dtype == torch.float32
        and module.weight.is_contiguous()
        and not _is_heard(module)
    )


def _call(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`module` as a function, without the cost of calling it where nobody listens."""
    return module if _is_heard(module) else module.forward


class _Product:
    """Few rows times the weight of a plain linear layer: the bulk of a step, and bound by how fast the weight is read.

    A small weight is read fastest from a copy in which a column lies in one piece; a large one by oneDNN, at up to
    twice the speed of `F.linear`; compiled, for one row, by a plain sum, which runs at the memory's own.
    """

    def __init__(self, module: nn.Linear):
        self.module, self.is_small = module, module.weight.numel() <= SMALL_WEIGHT
        self.columns: torch.Tensor | None = None
        self.refresh()

    def refresh(self) -> None:
        """Copy a small weight: it may have changed, and not every change leaves a trace that could be looked for."""
        if self.is_small:
            self.columns = self.module.weight.detach().t().contiguous()

    def __call__(self, states: torch.Tensor, other: torch.Tensor | None = None, then: str = "none") -> torch.Tensor:
        """states (rows, in) times the weight, (rows, out); then "swish", or "add" or "mul" of `other` (rows, out)."""
        if not torch.compiler.is_compiling() and not self.is_small:
            if other is None:
                return torch.ops.mkldnn._linear_pointwise.default(states, self.module.weight, None, then, [], "")
            return torch.ops.mkldnn._linear_pointwise.binary(states, other, self.module.weight, None, then)
        if torch.compiler.is_compiling():
            output = (self.module.weight * states).sum(-1)[None]
        elif then == "add":
            return torch.addmm(other, states, self.columns)
        else:
            output = torch.mm(states, self.columns)
        if then == "swish":
            return F.silu(output)
        return output if other is None else output + other if then == "add" else output * other


def _projection(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """(rows, in) to (rows, out)."""
    return _Product(module) if _is_plain(module) else _call(module)


class _Residual:
    """(rows, in) and what to add to (rows, out)."""

    def __init__(self, projection: Callable):
        self.projection, self.is_fused = projection, isinstance(projection, _Product)

    def __call__(self, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.is_fused:
            return self.projection(states, residual, "add")
        return self.projection(states) + residual


class _Gated:
    """(rows, in): `act(gate(x)) * up(x)`."""

    def __init__(self, gate: Callable, up: Callable, act_fn: nn.Module, activation: str):
        self.gate, self.up, self.act = gate, up, _call(act_fn)
        plain = isinstance(gate, _Product) and isinstance(up, _Product)
        self.is_fused = plain and activation in ("silu", "swish") and not _is_heard(act_fn)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self.is_fused:
            return self.up(states, self.gate(states, then="swish"), "mul")
        return self.act(self.gate(states)) * self.up(states)


class DecodeStep:
    """Forward passes of a `kv_routing="head"` model over up to `FEW_TOKENS` tokens on top of a `SageMusicCache`.

    Holds the modules and copies of their small weights; `of` renews both for the next generation.

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
        self.layers, self.products = [], []
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            made = [
                _projection(m) for m in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            ]
            query, mixed, gate, up, down = made
            gated = _Gated(gate, up, mlp.act_fn, config.hidden_act)
            norms = layer.input_layernorm, layer.post_attention_layernorm
            self.layers.append((*norms, attention, query, _Residual(mixed), gated, _Residual(down)))
            self.products += [product for product in made if isinstance(product, _Product)]
        self.compiled = None if compile_options is None else torch.compile(self.run, **compile_options)
        self.signature = self.sign(model)

    @staticmethod
    def sign(model: nn.Module) -> list[tuple[int, bool, bool]]:
        """What a step depends on: which modules there are, whether they are heard, and which are plain."""
        return [(id(module), _is_heard(module), _is_plain(module)) for module in model.modules()]

    @classmethod
    def of(cls, model: nn.Module, old: "DecodeStep | None", compile_options: dict | None) -> "DecodeStep | None":
        """The step for a `SageMusicModel`: `old` where it still fits, since compiling takes seconds; `None` where the
        model has to run by its modules (another routing, attention, device or half precision; hooks on whole layers, or
        adapters around more than linear layers: PEFT's around `kv_weight` are around the whole attention).
        """
        config = model.config
        if config.kv_routing != "head" or config._attn_implementation != "sdpa" or model.device.type != "cpu":
            return None
        if model.dtype not in (torch.float32, torch.float64) or not torch.backends.mkldnn.is_available():
            return None
        wholes = [model, model.embed_tokens, model.norm, model.rotary_emb]
        for layer in model.layers:
            wholes += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        if any(_is_heard(module) or not _is_own(module, model) for module in wholes):
            return None
        if old is not None and old.compile_options == compile_options and old.signature == cls.sign(model):
            for product in old.products:
                product.refresh()
            return old
        return cls(model, compile_options)

    def takes(self, input_ids: torch.Tensor | None, cache, kwargs: dict) -> bool:
        """Whether this pass is one for the decode step."""
        return (
            input_ids is not None
            and input_ids.shape[1] <= FEW_TOKENS
            and cache.lengths is not None
            and not torch.is_grad_enabled()
            and not any(kwargs.get(name) is not None for name in PACKING)
            and not any(
                kwargs.get(name) or getattr(self.model.config, name, False)
                for name in ("output_hidden_states", "output_attentions")
            )
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
            norm, next_norm, attention, query_of, add_mixed, gated, add_gated = parts
            normed = norm_rows(states, norm.weight)
            query = norm_heads(query_of(normed).view(batch, length, -1, head_dim), attention.q_norm)
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
