"""What a transformers model is made of: its family, its self-attention modules and what runs its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How the encoders of one architecture are built.

    Attributes:
        name: what people call it.
        attention: class of the self-attention modules.
        stack: class of the module that runs the layers one after the other.
        query: name of an attention module's query projection.
        heads: name of its number of heads.
        feed_forward: names of a feed-forward block's first linear layer and of the activation that follows it.
        shared: class of the module that is called once for each layer, where layers share their weights.
    """

    name: str
    attention: str
    stack: str
    query: str = "query"
    heads: str = "num_attention_heads"
    feed_forward: tuple[str, str] = ("dense", "intermediate_act_fn")
    shared: str | None = None


# Named, not imported: a model's classes are there once there is a model.
FAMILIES = (
    Family("BERT", "BertSelfAttention", "BertEncoder"),
    Family("RoBERTa", "RobertaSelfAttention", "RobertaEncoder"),
    Family("XLM-RoBERTa", "XLMRobertaSelfAttention", "XLMRobertaEncoder"),
    Family("CamemBERT", "CamembertSelfAttention", "CamembertEncoder"),
    Family("ELECTRA", "ElectraSelfAttention", "ElectraEncoder"),
    Family(
        "DistilBERT",
        "DistilBertSelfAttention",
        "Transformer",
        query="q_lin",
        heads="n_heads",
        feed_forward=("lin1", "activation"),
    ),
    Family(
        "ALBERT", "AlbertAttention", "AlbertTransformer", feed_forward=("ffn", "activation"), shared="AlbertLayerGroup"
    ),
)
BERT = FAMILIES[0]


def is_a(module: nn.Module, name: str | None) -> bool:
    """Whether a module is of the class of transformers with this name."""
    return _is_class(type(module), name)


@cache
def _is_class(kind: type, name: str | None) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith("transformers.") for cls in kind.__mro__)


@dataclass(frozen=True)
class Encoder:
    """The encoder of a model.

    Attributes:
        family: of the model.
        model: the transformers model itself, as given or found inside of what was given.
        attention: the self-attention module of each layer, first layer first; the same one several times where layers
            share it.
        stacks: the modules that run the layers.
    """

    family: Family
    model: PreTrainedModel
    attention: list[nn.Module]
    stacks: list[nn.Module]

    @property
    def heads(self) -> int:
        return getattr(self.attention[0], self.family.heads)

    @property
    def head_dim(self) -> int:
        return self.attention[0].attention_head_size

    def query_of(self, module: nn.Module) -> nn.Linear:
        """An attention module's query projection."""
        return getattr(module, self.family.query)


def encoder_of(model: nn.Module) -> Encoder:
    """Looks into a model of a supported family, or into a module around one, such as a SentenceTransformer.

    Attention modules are found by class and ordered by their place in the model, never by `layer_idx`, which other
    attention modules may share.

    Raises:
        TypeError: there is no such model in it, or several.
        ValueError: an ALBERT whose groups hold several layers.
    """
    inner = inner_model(model)
    supported = ", ".join(family.name for family in FAMILIES)
    for family in FAMILIES:
        modules = [module for module in inner.modules() if is_a(module, family.attention)]
        if modules:
            stacks = [module for module in inner.modules() if is_a(module, family.stack)]
            return Encoder(family, inner, _one_a_layer(inner, family, modules), stacks)
    raise TypeError(
        f"{type(inner).__name__} has no attention that can be patched; expected a model of {supported}. In a model of "
        "your own, call sparse_attention"
    )


def inner_model(model: nn.Module) -> PreTrainedModel:
    """A model of transformers itself, or the one in a module around it. Raises TypeError where there is none, or
    several."""
    if isinstance(model, PreTrainedModel):
        return model
    found = [] if not isinstance(model, nn.Module) else list(_outermost(model))
    if len(found) != 1:
        what = f"holds {len(found)} transformers models" if found else "is not a transformers model and holds none"
        raise TypeError(
            f"{type(model).__name__} {what}; expected one, such as BertModel or a Bert model with a head, which "
            "from_pretrained(name) makes"
        )
    return found[0]


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _outermost(child)


def transformers_models(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model and those in it, each before those in itself."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _one_a_layer(model: PreTrainedModel, family: Family, modules: list[nn.Module]) -> list[nn.Module]:
    if family.shared is None:
        return modules
    layers, groups = model.config.num_hidden_layers, model.config.num_hidden_groups
    if len(modules) != groups:
        raise ValueError(
            f"{type(model).__name__} has {len(modules)} layers in {groups} groups (inner_group_num "
            f"{model.config.inner_group_num}); expected groups of one layer"
        )
    return [modules[layer * groups // layers] for layer in range(layers)]


def own_configs(model: PreTrainedModel) -> list[tuple[nn.Module, PretrainedConfig]]:
    """Gives `model` configs of its own, so that other models built from the same ones are not changed with it.

    Returns:
        Every module that refers to a config, and the one that it had. Those that were one object, or part of another
        one, are so again.
    """
    before = [
        (module, module.config)
        for module in model.modules()
        if isinstance(getattr(module, "config", None), PretrainedConfig)
    ]
    copies: dict = {}
    for module, config in before:
        module.config = copy.deepcopy(config, copies)
    return before


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs `model` with the registered attention `name`, and with the one it had afterwards."""
    previous = model.config._attn_implementation
    set_attention_implementation(model, name)
    try:
        yield
    finally:
        set_attention_implementation(model, previous)


def set_attention_implementation(model: PreTrainedModel, name: str) -> None:
    """`model.set_attn_implementation(name)`, which only logs where it fails; here it raises RuntimeError. Layers whose
    config is no longer their model's, which that does not reach, follow it: `EncoderDecoderModel` leaves such."""
    model.set_attn_implementation(name)
    for each in transformers_models(model):  # a model comes before those in it
        for module in each.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
                config._attn_implementation = each.config._attn_implementation
    if model.config._attn_implementation != name:
        raise RuntimeError(
            f"transformers left {type(model).__name__} with attention {model.config._attn_implementation!r} when "
            f"asked for {name!r}; this model does not route its attention through AttentionInterface"
        )


@contextmanager
def attached(encoder: Encoder, name: str, thing: object) -> Iterator[None]:
    """Lets an encoder's self-attention modules have a `thing` under a name, for what computes their attention."""
    for module in encoder.attention:
        setattr(module, name, thing)
    try:
        yield
    finally:
        for module in encoder.attention:
            module.__dict__.pop(name, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs `model` in eval mode; afterwards every module of it has the mode of its own back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
