"""What is timed on long documents: encoders with dense and with sparse attention, and whether they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from sparse_attn import GlobalMask, patch_bert
from sparse_attn.bitpacking import PackedMask

from .pages import row_name
from .squad.peers import use_flex
from .synthetic_masks import synthetic_mask
from .verdicts import Wrong

_BERT_BASE = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
_CHECKED_LENGTH = 512
_LIMITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}  # relative, of one layer's output

Forward = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Document:
    """What the encoders read.

    Attributes:
        batch, length: documents, all of them full, and their tokens.
        layers: of the encoder.
        density: share of positions that the masks keep.
        dtype, device_type: names.
    """

    batch: int
    length: int
    layers: int
    density: float
    dtype: str
    device_type: str


@dataclass(frozen=True)
class Variant:
    """An encoder: its attention ("eager" or "sdpa"; over a mask "sparse" or "flex"), its mask ("dense", "element" or
    "tile"), the bits that probabilities are rounded to, whether its layers are compiled, `patch_bert`'s `onednn`."""

    name: str
    attention: str
    mask: str = "dense"
    bits: int | None = None
    compiled: bool = False
    onednn: bool | None = None

    @property
    def label(self) -> str:
        return row_name(self.name, self.mask, bits=self.bits)


def variants_on(device: torch.device) -> list[Variant]:
    """Those worth measuring on a device: compiling gains little on a CPU and takes minutes, but there is oneDNN to tell
    apart."""
    variants = [
        Variant("eager", "eager"),
        Variant("sdpa", "sdpa"),
        Variant("sparse", "sparse", "element"),
        Variant("sparse", "sparse", "tile"),
        Variant("sparse", "sparse", "tile", bits=3),
    ]
    if device.type == "cuda":
        variants += [
            Variant("flex", "flex", "element"),
            Variant("flex", "flex", "tile"),
            Variant("compiled", "sdpa", compiled=True),
            Variant("sparse-compiled", "sparse", "element", compiled=True),
            Variant("sparse-compiled", "sparse", "tile", compiled=True),
        ]
    else:
        variants.append(Variant("sparse-plain", "sparse", "tile", onednn=False))
    return variants


def inputs_of(document: Document) -> dict[str, Tensor]:
    tokens = torch.randint(0, 1000, (document.batch, document.length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens.to(document.device_type)}


def make(document: Document, variant: Variant, mask_length: int | None = None) -> Forward:
    """A function from inputs to the last hidden state. All variants have the same weights, and masks of `mask_length`,
    by default the document's."""
    model = _model(document, "sdpa" if variant.mask != "dense" else variant.attention)
    if variant.mask != "dense":
        mask = _mask(document, variant.mask, mask_length or document.length)
        if variant.attention == "flex":
            use_flex(model, mask)
        else:
            patch_bert(model, mask, variant.bits, onednn=variant.onednn)
    if variant.compiled:
        for layer in model.encoder.layer:
            layer.compile(dynamic=False)
    return partial(_run, model)


def check(document: Document, variant: Variant) -> None:
    """Compares one layer on the first tokens with the reference in float32. Raises Wrong."""
    short = replace(document, batch=1, length=min(document.length, _CHECKED_LENGTH), layers=1)
    own = make(short, variant, document.length)(inputs_of(short)).float()
    exact_model = _model(replace(short, dtype="float32"), "eager")
    if variant.mask != "dense":
        patch_bert(exact_model, _mask(short, variant.mask, document.length), variant.bits, backend="reference")
    exact = _run(exact_model, inputs_of(short))
    error = (torch.linalg.vector_norm(own - exact) / torch.linalg.vector_norm(exact)).item()
    if not error <= _LIMITS[document.dtype]:  # NaN is not
        raise Wrong(f"the output is off by {error:.1e} of its size, at most {_LIMITS[document.dtype]:.0e} expected")


@torch.inference_mode()
def _run(model: BertModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).last_hidden_state


def _model(document: Document, attention: str) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        **_BERT_BASE, num_hidden_layers=document.layers, max_position_embeddings=document.length,
        attn_implementation=attention,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    return model.to(document.device_type, getattr(torch, document.dtype))


def forget_layouts() -> None:
    """Frees the lists of all masks that no model uses any more; they are compiled again when needed."""
    _mask.cache_clear()


@cache
def _mask(document: Document, granularity: str, length: int) -> GlobalMask:
    return GlobalMask(_packed_mask(document, granularity, length))


@cache
def _packed_mask(document: Document, granularity: str, length: int) -> PackedMask:
    heads = _BERT_BASE["num_attention_heads"]
    keep = synthetic_mask(granularity, torch.device("cpu"), heads, length, document.density)
    return PackedMask.pack(keep.expand(document.layers, -1, -1, -1))
