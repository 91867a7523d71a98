"""``python -m runningbn inspect`` and ``diff``: output as JSON or tables, and the exit status.

Tables need rich, so `tables` is imported only when tables are printed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from .comparison import Comparison, compare, pairs
from .criteria import ERROR, Finding, Judged, judge, mean_over_std, spread
from .layers import EPS, SavedLayer, StateDict
from .reading import Source, read_checkpoint

# Exit statuses as of diff(1): 0 for nothing to report, 1 for findings, 2 for errors (see __main__).
FINE, WRONG = 0, 1


def run_inspect(source: Source, *, eps: float | None = None, as_json: bool) -> int:
    """Check every layer of a checkpoint and print the findings; `eps` as in `read_checkpoint`.

    Returns:
        1 if a finding is an error, so that evaluation is wrong; else 0.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
    """
    judged = [(state_dict, judge(state_dict)) for state_dict in read_checkpoint(source, eps)]
    if as_json:
        _print_json(inspection_as_json(source, judged, eps))
    else:
        from .tables import print_inspection

        for state_dict, layers in judged:
            print_inspection(source.path, state_dict, layers)
    severities = {finding.criterion.severity for _, layers in judged for _, found in layers for finding in found}
    return WRONG if ERROR in severities else FINE


def run_diff(source_a: Source, source_b: Source, *, eps: float | None = None, as_json: bool) -> int:
    """Compare the statistics of two checkpoints by layer and print the result; `eps` as in `read_checkpoint`.

    Returns:
        1 if something could not be compared, else 0, however far the statistics moved.

    Raises:
        CheckpointError: if a checkpoint cannot be read.
    """
    a, b = read_checkpoint(source_a, eps), read_checkpoint(source_b, eps)
    comparisons = [compare(*pair) for pair in pairs(a, b, source_a.within, source_b.within)]
    unpaired_a = [entry.place for entry in a if entry.place not in {each.place_a for each in comparisons}]
    unpaired_b = [entry.place for entry in b if entry.place not in {each.place_b for each in comparisons}]
    if as_json:
        contents = {
            "a": str(source_a),
            "b": str(source_b),
            "eps": EPS if eps is None else eps,
            "comparisons": [comparison_as_json(comparison) for comparison in comparisons],
            "only_in_a": unpaired_a,
            "only_in_b": unpaired_b,
        }
        _print_json(contents)
    else:
        from .tables import print_comparison, print_unpaired

        for comparison in comparisons:
            print_comparison(source_a.path, source_b.path, comparison)
        print_unpaired(source_a.path, unpaired_a)
        print_unpaired(source_b.path, unpaired_b)
    complete = not (unpaired_a or unpaired_b) and all(_complete(comparison) for comparison in comparisons)
    return FINE if complete else WRONG


def _complete(comparison: Comparison) -> bool:
    missing = (
        comparison.only_a,
        comparison.only_b,
        comparison.other_shapes,
        comparison.left_out_a,
        comparison.left_out_b,
    )
    return not any(missing) and all(math.isfinite(layer.moved) for layer in comparison.layers)


# ------------------------------------------------------------------------------------------------------------- JSON


def _print_json(contents: dict[str, Any]) -> None:
    print(json.dumps(contents, indent=1, allow_nan=False))


def inspection_as_json(
    source: Source, judged: Iterable[tuple[StateDict, Judged]], eps: float | None = None
) -> dict[str, Any]:
    """The output of ``inspect`` for JSON. Keys are stable: new ones may be added, none is removed."""
    return {
        "checkpoint": str(source),
        "eps": EPS if eps is None else eps,
        "state_dicts": [
            {
                "place": state_dict.place,
                "layers": [_layer_as_json(layer, found) for layer, found in layers],
                "left_out": [{"name": name, "reason": reason} for name, reason in state_dict.left_out],
            }
            for state_dict, layers in judged
        ],
    }


def _layer_as_json(layer: SavedLayer, found: Iterable[Finding]) -> dict[str, Any]:
    return {
        "name": layer.name,
        "channels": layer.channels,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "batches_tracked": layer.batches,
        "eps": layer.eps,
        "mean_over_std": spread(mean_over_std(layer)),
        "var": spread(layer.var),
        "state": _state_as_json(layer) if layer.state else None,
        "findings": [
            {
                "name": finding.criterion.name,
                "severity": finding.criterion.severity,
                "channels": len(finding.indices),
                "indices": list(finding.indices),
                "sentence": finding.criterion.sentence,
            }
            for finding in found
        ],
    }


def _state_as_json(layer: SavedLayer) -> dict[str, Any]:
    """The state of this library's layers. If it was seeded from given statistics, their amount of data is unknown."""
    return {
        "taken_over": layer.is_seeded,
        "samples": None if layer.is_seeded else spread(layer.state["samples"])["max"],
        "batches": spread(layer.state["steps"])["max"],
        "effective_elements": None if layer.is_seeded else spread(layer.effective_elements)["median"],
    }


def comparison_as_json(comparison: Comparison) -> dict[str, Any]:
    """The output of ``diff`` for two state dicts. Keys are stable: new ones may be added, none is removed."""
    return {
        "place_a": comparison.place_a,
        "place_b": comparison.place_b,
        "prefix_a": comparison.prefix_a,
        "prefix_b": comparison.prefix_b,
        "wrappers_a": list(comparison.wrappers_a),
        "wrappers_b": list(comparison.wrappers_b),
        "layers": [
            {
                "name": layer.name,
                "channels": len(layer.mean),
                "eps": layer.eps,
                "mean_shift": _finite(layer.mean_shift),
                "mean_shift_max": _finite(layer.mean_shift_max),
                "std_shift": _finite(layer.std_shift),
                "var_ratio": _finite(layer.var_ratio),
                "var_ratio_extreme": _finite(layer.var_ratio_extreme),
            }
            for layer in comparison.layers
        ],
        "only_in_a": list(comparison.only_a),
        "only_in_b": list(comparison.only_b),
        "other_shapes": [{"name": name, "channels_a": a, "channels_b": b} for name, a, b in comparison.other_shapes],
        "left_out_a": [{"name": name, "reason": reason} for name, reason in comparison.left_out_a],
        "left_out_b": [{"name": name, "reason": reason} for name, reason in comparison.left_out_b],
    }


def _finite(number: float) -> float | None:
    """The number, or None (null) if it is not finite, since JSON has no NaN."""
    return number if math.isfinite(number) else None
