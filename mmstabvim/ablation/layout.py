"""Arrangement of combinations in the panels of a report's figures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmstabvim.ablation.results import Study
from mmstabvim.ablation.statistics import Combination

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Labels that are compared inside a panel, and those with panels.

    Attributes:
        series (str): Label whose values are compared: that of the baseline,
            else the last one.
        names (list[str]): Values of that label in their order.
        panels (list[str]): The labels that vary besides, and
            ``'precision'`` and ``'lr'`` where they do.
    """

    series: str
    names: list[str]
    panels: list[str]

    def facet(self, combination: Combination, without: str = '') -> str:
        """Name of the panel of a combination."""
        values = facet_values(combination)
        return ', '.join(
            f'lr {values[name]}' if name == 'lr' else str(values[name])
            for name in self.panels
            if name in values and name != without
        )

    def name(self, combination: Combination) -> str:
        """Series that a combination belongs to."""
        return combination.labels.get(self.series, '')


def facet_values(combination: Combination) -> dict[str, str]:
    """Join labels, precision and learning rate in one dict.

    Args:
        combination (Combination): Any.

    Returns:
        dict[str, str]: Text of each.
    """
    lr = 'of config' if combination.lr is None else f'{combination.lr:g}'
    return {
        **combination.labels,
        'precision': combination.precision,
        'lr': lr,
    }


def make_layout(study: Study, combinations: Sequence[Combination]) -> Layout:
    """Choose what is compared inside the panels.

    Args:
        study (Study): Gives labels and baseline.
        combinations (Sequence[Combination]): The whole study.

    Returns:
        Layout: The same for all figures.
    """
    series = [*study.orders, *study.baseline][-1]
    values: dict[str, set[str]] = {}
    for combination in combinations:
        for name, value in facet_values(combination).items():
            values.setdefault(name, set()).add(value)
    panels = [
        name
        for name, found in values.items()
        if name != series and len(found) > 1
    ]
    return Layout(series, list(study.orders.get(series, [])), panels)
