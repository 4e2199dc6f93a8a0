"""The columns of the tables of ``moe-kernels transfer train``: the methods asked for, with the options of each."""

from collections.abc import Callable
from typing import Any

from moe_kernels.models.transfer import protocol
from moe_kernels.models.transfer.configuration import PLAIN, FineTuneConfig
from moe_kernels.models.transfer.regularizers import REGULARIZERS

PAPER = "paper"
DEFAULTS = FineTuneConfig()
_REGULARIZED = set(REGULARIZERS)
_OF_FEATURES = {name for name, kind in REGULARIZERS.items() if kind.uses_features}


def _regularized(method: str, dtnh: bool, measure: bool) -> bool:
    return method in _REGULARIZED


def _compares_gradients(method: str, dtnh: bool, measure: bool) -> bool:
    return method in _REGULARIZED and (dtnh or measure or method not in _OF_FEATURES)


# Options that mean something for some methods only: whether for this one, with or without dtnh, measured or not.
_USED: dict[str, Callable[[str, bool, bool], bool]] = {
    "dtnh": _regularized,
    "coefficient": _regularized,
    "coefficient_decay": _regularized,
    "parameters": lambda method, dtnh, measure: method in ("l2", "l2-sp"),
    "layers": lambda method, dtnh, measure: method in _OF_FEATURES,
    "head_decay": lambda method, dtnh, measure: method in _REGULARIZED - {"l2"},
    "scope": _compares_gradients,
    "anchored_only": _compares_gradients,
    "measure": lambda method, dtnh, measure: method in _OF_FEATURES and not dtnh,
}


def configurations(methods: list[str], *, dtnh: bool, measure: bool, **options: Any) -> list[FineTuneConfig]:
    """One configuration for each column. A method has the defaults of options that mean nothing for it.

    Args:
        methods: names of methods, or :data:`PAPER` alone: the five columns of its tables.
        options: the other fields of :class:`FineTuneConfig`.

    Raises:
        ValueError: an option that means nothing for any of the methods, or one out of its range.
    """
    columns: list[tuple[str, bool]]
    if PAPER in methods:
        if len(methods) > 1 or dtnh:
            raise ValueError(f"method {PAPER} is all five columns, without and with dtnh; it stands alone")
        columns = list(protocol.PAPER)
    else:
        columns = [(name, dtnh and name != PLAIN) for name in dict.fromkeys(methods)]
    options |= {"dtnh": dtnh, "measure": measure}
    configs = [
        FineTuneConfig(
            **{name: value for name, value in options.items() if name not in _USED or _USED[name](*column, measure)}
            | {"method": column[0], "dtnh": column[1]}
        )
        for column in columns
    ]
    for name, used in _USED.items():
        if options[name] != getattr(DEFAULTS, name) and not any(used(*column, measure) for column in columns):
            asked = ", ".join(protocol.label(*column) for column in columns)
            raise ValueError(f"{name} means nothing for {asked}, got {options[name]!r}")
    return configs
