"""Keys of two sections that do not go together, beside the combinations of configs/combinations.py."""

from configs.schema import Config


def contradiction_of(config: Config) -> tuple[str, str] | None:
    """(dotted key, sentence) of a config that asks for what another section rules out, or None."""
    if config.flow.keep_target == "base" and config.method.type == "full":
        return "flow.keep_target", (
            "flow.keep_target base and method.type full do not go together: the base is what trains, and nothing of it "
            "stays frozen. Set flow.keep_target=picture, or train an adapter"
        )
    if config.validation.weights == "ema" and config.train.ema_decay is None:
        return "validation.weights", (
            "validation.weights is ema, but train.ema_decay is null, so no average is kept. Set train.ema_decay=0.999, "
            "or validation.weights=live"
        )
    return None
