"""The model card of a Hub directory: what the manifest of its run says, and nothing else."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig

_PLACES = re.compile(r"[^\s=,:'\"]*/(?=[^/\s=,'\"])")  # of a path, all before its last part
_OF_HUB = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")  # where the Hub's own cache has OWNER/NAME
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def check_license(license: str) -> None:
    """Raises a UserError where --license is no identifier as the Hub's are. Empty is none."""
    if license and not _LICENSE.fullmatch(license):
        raise UserError(
            f"--license={license!r}: expected an identifier of the Hub in small letters, such as apache-2.0, mit, "
            "llama3.2, or other."
        )


def text(
    architecture: str, model: ModelConfig, manifest: Mapping[str, Any], trained: Mapping[str, float], license: str
) -> str:
    """README.md, of YAML front matter and Markdown.

    Args:
      manifest: of the run that trained the model, or of what it was made of.
      trained: how far the run had come: "step", "tokens", "flops", "val_loss", as far as they are known.
    """
    config = manifest.get("config") or {}
    start = name_of(config["init"]["path"]) if config.get("init", {}).get("path") else ""
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lmboost"]}
    front |= {"license": license} if license else {}
    front |= {"base_model": start} if "/" in start else {}
    parts = [
        # A value of JSON is one of YAML.
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"]),
        f"# {architecture}, {model.num_params():,} parameters",
        f"{model.num_layers} layers of width {model.d_model}, {model.num_heads} heads ({model.num_kv_heads} of keys "
        f"and values), MLPs of {model.mlp_dim}, a vocabulary of {model.vocab_size:,}. Written by `lmboost.convert`.",
    ]
    if config:
        helpers = [f"a {name}" for name in ("teacher", "scorer") if manifest.get(name)]
        steps = f"{config['steps']:,}"
        if trained.get("step", config["steps"]) != config["steps"]:
            steps = f"{trained['step']:,} of {steps}"
        parts.append(
            f"Pretrained with lmboost for {steps} steps of {config['batch_size']:,} rows of "
            f"{config['seq_len']:,} tokens, {'with the help of ' + ' and '.join(helpers) if helpers else 'alone'}."
        )
        rows = [f"| {name} | {value} |" for name, value in _facts(config, manifest, trained, start).items()]
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
    shown = json.dumps(_without_places(manifest), indent=1, sort_keys=True)
    return "\n\n".join([*parts, "Its manifest:", f"```json\n{shown}\n```"]) + "\n"


def _facts(
    config: Mapping[str, Any], manifest: Mapping[str, Any], trained: Mapping[str, float], start: str
) -> dict[str, str]:
    """The rows of the card's table; what the manifest does not say has none."""
    recipe = next((w.partition("=")[2] for w in manifest.get("command", ()) if w.startswith("--config=")), "")
    data = manifest["data"]
    facts = {"recipe": f"`{os.path.basename(recipe)}`" if recipe else ""}
    facts["start"] = f"`{start}`, {config['init']['kind']}" if start else "random parameters"
    for name in ("teacher", "scorer"):
        if about := manifest.get(name):
            facts[name] = f"`{name_of(about['directory'])}`"
    facts |= {"training data": _code(data.get("train")), "tokenizer": _code(data.get("tokenizer"))}
    if "tokens" in trained:
        facts |= {"tokens": f"{trained['tokens']:,.0f}", "FLOPs": f"{trained['flops']:.3g}"}
    if "val_loss" in trained:
        facts["validation loss"] = f"{trained['val_loss']:.4f} on {_code(data.get('fingerprint'))}"
    return {name: value for name, value in facts.items() if value}


def _code(fingerprint: str | None) -> str:
    return f"`{fingerprint}`" if fingerprint else ""


def name_of(path: str) -> str:
    """The name under which a model is told of: OWNER/NAME where it lies in the Hub's cache, else its directory's."""
    if found := _OF_HUB.search(path):
        return f"{found[1]}/{found[2]}"
    parts = [part for part in path.removeprefix("hf:").split("/") if part]
    return parts[-3] if parts[-2:-1] == ["checkpoints"] and len(parts) > 2 else "".join(parts[-1:])


def _without_places(value: Any) -> Any:
    """A manifest to be published: of each path in it the last part alone."""
    if isinstance(value, Mapping):
        return {key: x if key == "layer_sizes" else _without_places(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(x) for x in value]
    return _PLACES.sub("", value) if isinstance(value, str) else value
