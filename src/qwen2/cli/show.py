"""`qwen2 show`: what a model is, given as a name, a folder or a file. Reads headers only."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qwen2.cli.list import places
from qwen2.weights.modelfile import UNCHANGED
from qwen2.weights.names import parse
from qwen2.weights.pull import human_size
from qwen2.weights.registry import ENTRIES, Entry, by_repository, canonical
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from qwen2.config import ModelConfig
    from qwen2.config.family import Release
    from qwen2.weights.describe import Description
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.modelfile import Modelfile

Facts = dict[str, object]
Flag = Parameter(negative=())
OWN_OUTPUT = "own_output_parameters"


def show(
    model: str,
    /,
    *,
    config: Annotated[bool, Flag] = False,
    template: Annotated[bool, Flag] = False,
    modelfile: Annotated[bool, Flag] = False,
    tensors: Annotated[bool, Flag] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Show what a model is.

    Parameters
    ----------
    model
        A name, a GGUF file or a Hugging Face folder.
    config
        The configuration and exact counts. Needs no download for the released Qwen2 models.
    template
        The chat template that is used, as Jinja text.
    modelfile
        The Modelfile that makes this model again, for qwen2 create.
    tensors
        Every tensor: name, type, shape, bytes.
    json_
        As JSON.
    """
    store = Store()
    if modelfile:
        _print_modelfile(store, model, json_)
        return
    release = _release(model) if config and not store.is_path(model) else None
    if release is not None:
        _print(_config_facts(release.config), json_)
        return
    if not (template or tensors or config or store.is_path(model)) and (entry := _not_here(store, model)) is not None:
        _print(_published(entry), json_)
        return
    path, name = store.resolve(model)
    from qwen2.weights.describe import describe  # the tokenizers library is not needed before

    stored = None if store.is_path(model) else store.get(name)
    made = UNCHANGED if stored is None else stored.made
    described = describe(path, None if stored is None else stored.adapter_path)
    described = replace(described, generation=made.defaults(described.generation))
    if template:
        _print_template(described, made, json_)
    elif tensors:
        _print_tensors(described, json_)
    elif config:
        _print(_config_facts(described.config), json_)
    else:
        _print(_summary(described, name, stored), json_)


def _not_here(store: Store, model: str) -> Entry | None:
    """The published model of that name, where it is not pulled."""
    try:
        return None if store.has(model) else ENTRIES.get(str(by_repository(model) or canonical(parse(model))))
    except ValueError:
        return None


def _published(entry: Entry) -> Facts:
    """What is known of a model without its files."""
    from qwen2.config import FAMILY

    facts: Facts = {"name": entry.name, "state": f"not pulled: qwen2 pull {entry.name} gets it"}
    release = FAMILY.get(entry.name)
    if release is not None:
        facts |= {**_shape(release.config), "defaults": asdict(release.generation)}
    facts |= {"format": entry.format, "licence": entry.licence, "source": places(entry)}
    return facts if entry.known is None else {**facts, "size": entry.known.size, "sha256": entry.known.sha256}


def _shape(config: ModelConfig) -> Facts:
    facts: Facts = {"parameters": config.parameters(), "active_parameters": config.active_parameters()}
    if _has_own_output(config):
        facts[OWN_OUTPUT] = config.embedding_parameters()
    return facts | {
        "context": config.window,
        "layers": config.layers,
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
    }


def _has_own_output(config: ModelConfig) -> bool:
    """Whether the file holds an output matrix that the released model of this shape shares with the embedding."""
    from qwen2.config import FAMILY

    ours = (config.layers, config.hidden, config.ffn)
    released = (release.config for release in FAMILY.values() if release.config.tied)
    return not config.tied and any(ours == (one.layers, one.hidden, one.ffn) for one in released)


def _release(model: str) -> Release | None:
    """The released model of that name; None for names that only the files can tell about."""
    from qwen2.config import FAMILY

    try:
        name = by_repository(model) or canonical(parse(model))
    except ValueError:
        return None
    return FAMILY.get(str(name))


def _config_facts(config: ModelConfig) -> Facts:
    """Each field that is set, and what follows from them by counting."""
    fields = {name: value for name, value in asdict(config).items() if value is not None}
    return {
        **fields,
        "head_dim": config.head_dim,
        "parameters": config.parameters(),
        "non_embedding_parameters": config.non_embedding_parameters(),
        "embedding_parameters": config.embedding_parameters(),
        "active_parameters": config.active_parameters(),
        **({OWN_OUTPUT: config.embedding_parameters()} if _has_own_output(config) else {}),
        "flops_per_token_first": config.flops_per_token(),
        "flops_per_token_last": config.flops_per_token(config.context - 1),
        "cache_bytes_per_token": config.cache_bytes_per_token(),
    }


def _summary(described: Description, name: str, stored: StoredModel | None) -> Facts:
    from qwen2.tokenizer import ChatTemplate

    config, tokenizer = described.config, described.tokenizer
    made = UNCHANGED if stored is None else stored.made
    template = ChatTemplate.of(tokenizer, source=made.template)
    facts: Facts = {
        "name": name,
        "architecture": described.architecture,
        **_shape(config),
        "container": described.container,
        "weights": {kind: f"{share.tensors} tensors, {human_size(share.size)}" for kind, share in described.types.items()},
        "tokenizer": {"ids": tokenizer.vocab_size, "control": len(tokenizer.control)},
        "template": {"style": template.style, "default_system": template.default_system if made.system is None else made.system},
        **({"messages": len(made.messages)} if made.messages else {}),
        "defaults": asdict(described.generation),
        "licence": _licence(described, stored),
        "size": described.size,
        "path": str(described.path),
    }
    if stored is not None and stored.adapter_path is not None:
        facts["adapter"] = _adapter(stored.adapter_path, stored)
    if stored is not None:
        facts |= {"sha256": stored.digest, "source": stored.source, "pulled": stored.pulled}
    return facts


def _adapter(folder: Path, stored: StoredModel) -> Facts:
    """What is said of a model's adapter; of the weights in it only the header is read."""
    from qwen2.weights.json_object import read_json
    from qwen2.weights.own_adapter import FILES
    from qwen2.weights.safetensors_header import read_safetensors_header

    layers = sum(name.endswith("lora_A.weight") for name in read_safetensors_header(folder / FILES[1]))
    facts: Facts = {"rank": read_json(folder / FILES[0]).get("r"), "layers": layers, "size": sum(file.size for file in stored.adapter)}
    return facts | {"from": stored.made.adapter or stored.adapter[0].source, "sha256": stored.adapter_digest}


def _licence(described: Description, stored: StoredModel | None) -> str:
    if stored is not None and stored.location is None:
        return stored.licence
    return "not stated" if described.licence is None else described.licence


def _print_modelfile(store: Store, model: str, as_json: bool) -> None:
    if store.is_path(model):
        raise ValueError(f"{model}: a file has no Modelfile; qwen2 create NAME makes a model of it, from one that says FROM {model}")
    from qwen2.weights.create import again

    stored = store.get(model)
    text = again(store, stored)
    print(json.dumps({"modelfile": text, **stored.made.to_json()}, indent=2, ensure_ascii=False) if as_json else text.rstrip())


def _print_template(described: Description, made: Modelfile, as_json: bool) -> None:
    """What conversations are really rendered with, also where the files have no template."""
    from qwen2.tokenizer import ChatTemplate

    template = ChatTemplate.of(described.tokenizer, source=made.template)
    if described.tokenizer.chat_template is None and made.template is None:
        print("qwen2: the files have no template: Qwen2's own is used", file=sys.stderr)
    if as_json:
        print(json.dumps({"style": template.style, "template": template.jinja}, indent=2, ensure_ascii=False))
    else:
        print(template.jinja)


def _print_tensors(described: Description, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(tensor) for tensor in described.tensors], indent=2))
        return
    width = max(len(tensor.name) for tensor in described.tensors)
    for tensor in described.tensors:
        print(f"{tensor.name:{width}}  {tensor.type:6}  {' x '.join(map(str, tensor.shape)):20}  {tensor.size:,}")


def _print(facts: Facts, as_json: bool) -> None:
    """As JSON, or one fact a line with what it holds beside it."""
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    rows = [(name, _plain(name, value)) for name, value in facts.items() if name != OWN_OUTPUT]
    if OWN_OUTPUT in facts:
        own = f", of which {facts[OWN_OUTPUT]:,} in an output matrix of its own"
        rows = [(name, text + own if name == "parameters" else text) for name, text in rows]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _plain(name: str, value: object) -> str:
    """A value for people: sizes with their unit, counts in groups of three digits, ids as they are."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(key, inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, (tuple, list)):
        return " ".join(str(one) for one in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name != "bos":
        return f"{human_size(value)} ({value:,} bytes)" if name == "size" else f"{value:,}"
    return repr(value) if name == "default_system" else f"{value:g}" if isinstance(value, float) else str(value)
