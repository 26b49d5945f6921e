"""The frozen base of an adapted transformer: the same weights, computed without the adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapters_off(transformer: nn.Module) -> Iterator[None]:
    """Within the context every layer, if it is adapted, computes as its base layer, which is called.

    peft's own disable_adapters also takes requires_grad from the adapter's parameters, which engines have taken into
    their optimizers and hooks; so the flag is set that its layers ask for, and nothing else.
    """
    layers = _adapted(transformer)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def without_adapter(transformer: nn.Module) -> Iterator[None]:
    """Within the context the transformer computes as its frozen base."""
    assert _adapted(transformer), "a transformer without an adapter has no frozen base"
    with adapters_off(transformer):
        yield


def _adapted(transformer: nn.Module) -> list[Any]:
    """Layers of peft, by their private flag: the import of their class would cost other runs half a second."""
    return [module for module in transformer.modules() if hasattr(module, "_disable_adapters")]
