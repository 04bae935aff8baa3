"""From the name of a model on the command line to the model."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from steepest._errors import UserError
from steepest.lab.files import load_object

if TYPE_CHECKING:
    from torch import nn


def _gpt() -> "nn.Module":
    from steepest.models import GPT, GPTConfig

    return GPT(GPTConfig(vocab_size=256, layers=2))


def _gpt_moe() -> "nn.Module":
    from steepest.models import GPT, GPTConfig

    return GPT(GPTConfig(vocab_size=256, layers=2, experts=8))


def _mlp() -> "nn.Module":
    from steepest.models import MLP

    return MLP([64, 128, 128, 10])


def _resnet() -> "nn.Module":
    from steepest.models import ResNet

    return ResNet()


BUILT_IN: dict[str, Callable[[], "nn.Module"]] = {"gpt": _gpt, "gpt-moe": _gpt_moe, "mlp": _mlp, "resnet": _resnet}
FORMS = "path/to/file.py:name, package.module:name, hf:ARCHITECTURE (such as hf:gpt2)"


def load_model(name: str) -> "nn.Module":
    """The model that `name` stands for.

    Args:
        name: a built-in model; ``path/to/file.py:name`` or ``package.module:name``, where name is a model, a function
            or class that makes one without arguments, or a race's task; or ``hf:ARCHITECTURE``, a transformers
            architecture with its default widths and two layers, made without weights and without a download.

    Raises:
        UserError: nothing goes by this name, it cannot be imported, or it does not give a model.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    scheme, colon, rest = name.partition(":")
    if scheme == "hf" and colon:
        return _transformers(rest)
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UserError(f"MODEL is {name!r}; it must be one of {', '.join(BUILT_IN)}, or {FORMS}")
    if place.endswith(".py"):
        return _as_model(load_object(name, "function"), name)
    module = _import(place)
    if not hasattr(module, attribute):
        raise UserError(f"{place} has no {attribute!r}")
    return _as_model(getattr(module, attribute), name)


def _import(place: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise UserError(f"no module is named {place!r}; for a file, give its path with .py") from None
        raise UserError(f"{place} cannot be imported: {error}") from error
    except Exception as error:
        raise UserError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _as_model(thing: Any, name: str) -> "nn.Module":
    from torch import nn

    if isinstance(thing, nn.Module):
        return thing
    if inspect.isclass(thing) and not issubclass(thing, nn.Module) and hasattr(thing, "model"):
        thing = _call(thing, name)
    if not inspect.isclass(thing) and callable(getattr(thing, "model", None)):
        made = _call(thing.model, name, 0)
    elif callable(thing):
        made = _call(thing, name)
    else:
        made = thing
    if not isinstance(made, nn.Module):
        raise UserError(f"{name} must give a torch.nn.Module, got {type(made).__name__}")
    return made


def _call(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    try:
        required = inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise UserError(f"{name} cannot be made without arguments ({error}); give a function that makes it") from None
    except ValueError:
        required = None
    try:
        return function(*required.args) if required else function(*arguments)
    except Exception as error:
        raise UserError(f"{name} failed: {type(error).__name__}: {error}") from error


def _transformers(architecture: str) -> "nn.Module":
    try:
        import transformers
    except ImportError:
        raise UserError("hf: models need transformers: pip install 'steepest[llm]'") from None
    import torch

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.for_model(architecture, num_hidden_layers=2)
    except Exception as error:
        if architecture in transformers.CONFIG_MAPPING:
            raise UserError(f"hf:{architecture} has no default configuration: {error}") from error
        raise UserError(
            f"transformers knows no architecture {architecture!r}; give a model type such as gpt2, llama or qwen3"
        ) from None
    failure: Exception | None = None
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            with torch.device("meta"):
                return kind.from_config(config)
        except Exception as error:
            failure = failure or error
    raise UserError(f"hf:{architecture} cannot be made from its default configuration: {failure}") from failure
