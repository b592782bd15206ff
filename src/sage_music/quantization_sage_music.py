"""Weights in 8-bit integers, for decoding on a CPU: a quarter of the bytes of float32 to read for each token."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

# Up to so many rows the integer product is faster than a dequantised one.
FEW_ROWS = 32
# The kernel reads 32 inputs at a time and past the end of a row that holds no multiple.
INPUT_MULTIPLE = 32


class Int8Linear(nn.Module):
    """`nn.Linear` without bias whose weights are int8 with one scale an output row (symmetric, round to nearest).

    A few rows are multiplied in bfloat16 with float32 sums, straight from the integers; many rows, as in a prefill,
    with the weights dequantised for the moment. Results have the dtype of the input.
    """

    def __init__(self, weight: torch.Tensor):
        """`weight` (out_features, in_features) is read, not kept."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float().contiguous()
        # The kernel takes bfloat16 scales: rounded first, so that the integers make up for it.
        largest = weight.abs().amax(dim=1).clamp(min=1e-12)
        scale = (largest / 127).to(torch.bfloat16)
        self.scale = nn.Buffer(scale)
        self.weight_int8 = nn.Buffer((weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8))

    @property
    def weight(self) -> torch.Tensor:
        """(out_features, in_features) dequantised, float32."""
        return self.weight_int8.float() * self.scale.float()[:, None]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.numel() // self.in_features
        if rows > FEW_ROWS or states.device.type != "cpu":
            return F.linear(states, self.weight.to(states.dtype))
        flat = states.reshape(rows, self.in_features).to(torch.bfloat16)
        output = torch._weight_int8pack_mm(flat, self.weight_int8, self.scale)
        return output.to(states.dtype).view(*states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def is_int8(model: nn.Module) -> bool:
    """Whether `quantize_int8` has been at work."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


@torch.no_grad()
def quantize_int8(model: nn.Module) -> nn.Module:
    """Quantise the weights of a model's linear layers to int8, in place, for generation on a CPU.

    The embedding, the norms and the key-value projections (of which a token reads one attribute's) stay as they are; a
    tied head becomes an int8 copy of the embedding. It cannot be undone, trained or saved: load the checkpoint again.

    Args:
        model: on the CPU, in float32.

    Returns:
        The model itself, in evaluation mode.

    Raises:
        ValueError: the model is not on a CPU, not in float32, quantised already, or has adapters that are not merged.
    """
    if model.device.type != "cpu":
        raise ValueError(
            f"int8 weights are for the CPU; the model is on {model.device}. There use dtype=torch.bfloat16."
        )
    if is_int8(model):
        raise ValueError("the model's weights are int8 already.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters: merge them first (sage_studio.checkpoints.load does).")
    if model.dtype != torch.float32:
        raise ValueError(f"int8 weights are made of float32 ones, not {model.dtype}: load it with dtype=torch.float32.")
    if not hasattr(torch, "_weight_int8pack_mm"):
        raise ValueError(f"PyTorch {torch.__version__} has no int8 product on the CPU: use dtype=torch.bfloat16.")
    left = []
    for name, module in list(model.named_modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is not nn.Linear:
                continue
            if linear.bias is not None or linear.in_features % INPUT_MULTIPLE:
                left.append(f"{name}.{child}".lstrip("."))
            else:
                setattr(module, child, Int8Linear(linear.weight))
    if left:
        warnings.warn(
            f"{len(left)} layers stay in float32 because they have a bias or inputs that are no multiple of "
            f"{INPUT_MULTIPLE}: {', '.join(left[:3])}{'...' if len(left) > 3 else ''}.",
            stacklevel=2,
        )
    return model.eval()


__all__ = ["Int8Linear", "is_int8", "quantize_int8"]
