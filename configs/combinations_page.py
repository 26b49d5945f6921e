"""docs/combinations.md, written from the rules.

python -m configs.combinations_page > docs/combinations.md
"""

from collections.abc import Sequence
from dataclasses import replace

from configs.combinations import CHOICES, ENGINES, KEYS, NOTES, REFUSED, Combination, Rule, refuse

_PRECISIONS = ("bf16", "int8", "nf4", "fp8")
_PLAIN = Combination(method="lora", precision="bf16", optimizer="adamw", engine="single")

_INTRODUCTION = """\
# What goes with what

Which methods, precisions of the base, optimizers and engines can be combined. A config that combines what cannot work
is refused before anything is loaded, with the reason and the nearest combination that works; `engine: auto` is checked
again once it is decided.

This page is made from the rules in `configs/combinations.py` by `python -m configs.combinations_page`; a test holds the
two together. A combination works if none of the refusals below is about it. Numbers in the tables are those refusals.
Precisions `auto` and `fp32` go with whatever `bf16` goes with.
"""


def render_page() -> str:
    """The page as Markdown."""
    methods = [
        (f"{method}, {precision}", [replace(_PLAIN, method=method, precision=precision, engine=e) for e in ENGINES])
        for method in CHOICES["method"]
        for precision in _PRECISIONS
    ]
    optimizers = [
        (optimizer, [replace(_PLAIN, optimizer=optimizer, engine=engine) for engine in ENGINES])
        for optimizer in CHOICES["optimizer"]
    ]
    full = replace(_PLAIN, method="full")
    weights = [
        (kind, [replace(full, weights=kind, engine=engine) for engine in ENGINES]) for kind in CHOICES["weights"]
    ]
    compiled = [
        (choice, [replace(_PLAIN, compile=choice, engine=engine) for engine in ENGINES])
        for choice in CHOICES["compile"]
    ]
    parts = [
        _INTRODUCTION,
        "## Method and precision of the base\n",
        _table("method.type, model.precision", methods),
        "## Optimizer\n",
        _table("train.optimizer", optimizers),
        "## Weights of full fine-tuning, with adamw\n",
        _table("train.weights", weights),
        "## Compiled blocks\n",
        _table("train.compile", compiled),
        "## Refused\n",
        "\n".join(f"{number}. {_describe(rule)}" for number, rule in enumerate(REFUSED, 1)) + "\n",
        "## Done in another way than the words say\n",
        "Each run that it concerns says it in its log.\n",
        "\n".join(f"- {_describe(rule)}" for rule in NOTES) + "\n",
    ]
    return "\n".join(parts)


def _table(first: str, rows: Sequence[tuple[str, Sequence[Combination]]]) -> str:
    lines = [f"| {first} | {' | '.join(ENGINES)} |", f"| --- |{' --- |' * len(ENGINES)}"]
    lines += [f"| {name} | {' | '.join(_cell(combination) for combination in cells)} |" for name, cells in rows]
    return "\n".join(lines) + "\n"


def _cell(combination: Combination) -> str:
    refusal = refuse(combination)
    return "yes" if refusal is None else f"no ({REFUSED.index(refusal.rules[0]) + 1})"


def _describe(rule: Rule) -> str:
    terms = [f"`{KEYS[key]}` {', '.join(values)}" for key, values in rule.when.items()]
    return f"{' with '.join(terms)}: {rule.text}."


if __name__ == "__main__":
    print(render_page(), end="")
