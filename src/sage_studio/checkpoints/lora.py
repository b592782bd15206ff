"""LoRA adapters for both families: train and keep a small update of each matrix instead of the matrices.

    model, tokenizer = load("sage-music")
    model = add_lora(model, rank=8)
    ...                                     # any training loop: only the adapter's weights have gradients
    model.save_pretrained("my-adapter")     # a megabyte
    model, tokenizer = load("my-adapter")   # the base model with the adapter merged into it

LoRA (Hu et al. 2021, arXiv 2106.09685) replaces W by W + (alpha / rank) B A with A (rank, in) and B (out, rank), of
which B begins as zero. Needs PEFT.

`save_pretrained` writes PEFT's own format, so that these load it too:

    PeftModel.from_pretrained(base_model, "my-adapter")
    base_model.load_adapter("my-adapter")
    SageMusicForCausalLM.from_pretrained("my-adapter")      # finds the base by base_model_name_or_path, see add_lora

An adapter that is not merged costs time with every token, and keeps SAGE-Music off its fast decode step: to play, load
it by `checkpoints.load`, or merge it by `merge_lora`. Of a `PeftModel` that `add_lora` did not make, PEFT's own
`merge_and_unload` merges a SAGE-Music only in part.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from sage_music.quantization_sage_music import is_int8
from sage_studio.errors import MissingExtraError, install_hint
from sage_studio.families import family_of

if TYPE_CHECKING:
    from peft import PeftModel

# SAGE-Music's key-value projections, one matrix an attribute, (A, 2 * h * d, hidden_size): no linear layer but a
# parameter of the attention, which PEFT knows as a "target parameter".
KV_WEIGHT = "kv_weight"


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Names of what LoRA can be put on: the linear layers of attention and MLP, and SAGE-Music's `kv_weight`.

    Norms, embeddings, the language-model head (tied to the embeddings by default) and the draft head are none.
    """
    names = set()
    for path, module in model.named_modules():
        if "layers." in path and type(module) is nn.Linear:  # of `layers` and `cross_layers`
            names.add(path.rpartition(".")[2])
        elif hasattr(module, KV_WEIGHT):
            names.add(KV_WEIGHT)
    return sorted(names)


def add_lora(
    model: PreTrainedModel,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> "PeftModel":
    """Freeze a model of either family and put trainable LoRA matrices beside its own. At first it computes what it did.

    `base_model_name_or_path` in the adapter's config becomes what the model was loaded by, a Hub name or a folder; for
    a bundled checkpoint its short name, `sage-music` or `perceivers`, not the place of its installation, which would be
    wrong on every other machine. Only `checkpoints.load` knows short names. PEFT and Transformers must be given
    the base: `model = SageMusicForCausalLM.from_pretrained(sage_music.PRETRAINED)`, then `model.load_adapter(folder)`.

    Args:
        model: changed in place: its linear layers are inside PEFT's afterwards.
        rank: rows of each A, columns of each B; an attribute of `kv_weight` has matrices of its own.
        alpha: the update counts `alpha / rank` times.
        dropout: share of a linear layer's inputs that its adapter does not see in training. 0 with `kv_weight`: of a
            parameter PEFT knows no input.
        targets: some of `lora_targets(model)`; all of them where it is None.

    Returns:
        The `PeftModel` to train: `Trainer` takes it as any model. Its `save_pretrained(folder)` writes
        `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        MissingExtraError: PEFT is not installed.
        ValueError: an argument outside its range, a name that is no target, a model that has adapters or int8 weights.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError(f"LoRA needs PEFT: {install_hint('peft')}.") from error
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"rank ({rank}) is 1 at least, alpha ({alpha}) above 0, dropout ({dropout}) from 0 to below 1."
        )
    if getattr(model, "peft_config", None):
        raise ValueError("the model has an adapter already: merge it (merge_and_unload) or load the checkpoint again.")
    if is_int8(model):
        raise ValueError("int8 weights cannot be trained: load the checkpoint again, and quantise after merging.")
    known = lora_targets(model)
    targets = known if targets is None else list(targets)
    unknown = sorted(set(targets) - set(known))
    if unknown or not targets:
        raise ValueError(f"LoRA targets {', '.join(unknown) or '(none)'}: choose from {', '.join(known)}.")
    linear = [name for name in targets if name != KV_WEIGHT]
    if dropout and KV_WEIGHT in targets:
        raise ValueError(
            f"LoRA dropout ({dropout}) does not work on {KV_WEIGHT}: use dropout 0, or the targets {', '.join(linear)}."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=linear,
        target_parameters=[KV_WEIGHT] if KV_WEIGHT in targets else None,
        task_type="CAUSAL_LM",
    )
    family = family_of(model)
    if model.name_or_path and Path(model.name_or_path).resolve() == family.pretrained.resolve():
        # PEFT writes the one into the adapter's config and the other into its model card.
        model.name_or_path = model.config.name_or_path = family.checkpoint
    adapted = get_peft_model(model, config)
    # By default PEFT asks the Hub at every saving whether the vocabulary has grown.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    adapted.merge_and_unload = partial(merge_lora, adapted)
    return adapted


def merge_lora(adapted: "PeftModel") -> PreTrainedModel:
    """Add the active adapter to the weights. Returns the model inside, which knows of no adapter afterwards.

    PEFT (0.21) passes over layers inside another adapted one in `merge_and_unload`, and so leaves SAGE-Music's `q_proj`
    and `o_proj`, inside the attention that is wrapped for its `kv_weight`, as they are. They are outermost then.

    Raises:
        ValueError: a merged weight is not finite.
    """
    merge = type(adapted.base_model).merge_and_unload
    model = merge(adapted.base_model, safe_merge=True)
    while any(hasattr(module, "lora_A") for module in model.modules()):
        model = merge(adapted.base_model, safe_merge=True)
    return model
