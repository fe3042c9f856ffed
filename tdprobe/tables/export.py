"""Views of a score table for other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tdprobe.errors import ConfigError, require_extra
from tdprobe.tables.block import ScoreCube, ScoreRow

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from tdprobe.tables.table import ScoreTable

AXES = ("checkpoint_a", "checkpoint_b", "layer_a", "layer_b")


def cube(table: ScoreTable, estimator: str | None) -> ScoreCube:
    """Lay the scores of one estimator out on common axes; see ``ScoreTable.cube``."""
    if estimator is None and len(table.estimators) != 1:
        raise ConfigError(f"a cube holds one estimator; name one of: {', '.join(table.estimators) or 'none'}.")
    part = table.select(estimator)
    spots = {name: i for i, name in enumerate(part.checkpoints)}
    places = {name: i for i, name in enumerate(part.layers())}
    if any(block.columns == "targets" for block in part.blocks):
        return _targets_cube(part, spots, places)
    single = all(block.layers_b is None for block in part.blocks)
    shape = (len(spots), len(places)) if single else (len(spots),) * 2 + (len(places),) * 2
    values = np.full(shape, np.nan)
    # Flipped blocks go first, so that what was measured in this order overwrites its mirror image.
    for block in [b.flipped() for b in part.blocks if b.symmetric] + list(part.blocks):
        rows = [places[name] for name in block.layers_a]
        if block.layers_b is None:
            values[spots[block.checkpoint_a], rows] = block.values
            continue
        columns = [places[name] for name in block.layers_b]
        values[spots[block.checkpoint_a], spots[block.checkpoint_b]][np.ix_(rows, columns)] = block.values
    return ScoreCube(part.estimators[0], tuple(spots), tuple(places), values)


def _targets_cube(part: ScoreTable, spots: dict[str, int], places: dict[str, int]) -> ScoreCube:
    targets = tuple(dict.fromkeys(name for block in part.blocks for name in block.layers_b or ()))
    values = np.full((len(spots), len(places), len(targets)), np.nan)
    for block in part.blocks:
        spot = np.ix_([places[name] for name in block.layers_a], [targets.index(name) for name in block.layers_b or ()])
        values[spots[block.checkpoint_a]][spot] = block.values
    return ScoreCube(part.estimators[0], tuple(spots), tuple(places), values, targets)


def to_pandas(table: ScoreTable) -> pd.DataFrame:
    """Return the long rows as a data frame; see ``ScoreTable.to_pandas``."""
    pandas = require_extra("pandas", "tables")
    return pandas.DataFrame.from_records(table.rows(), columns=list(ScoreRow._fields))


def to_xarray(table: ScoreTable) -> xr.Dataset:
    """Return one cube per estimator as a dataset; see ``ScoreTable.to_xarray``."""
    xarray = require_extra("xarray", "tables")
    arrays: dict[str, Any] = {}
    for name in table.estimators:
        one = table.cube(name)
        axes = {2: (AXES[0], AXES[2]), 3: (AXES[0], AXES[2], "target"), 4: AXES}[one.values.ndim]
        owned = {"checkpoint": one.checkpoints, "layer": one.layers, "target": one.targets}
        coords = {axis: list(owned[axis.partition("_")[0]]) for axis in axes}
        arrays[name] = xarray.DataArray(one.values, dims=axes, coords=coords)
    # Estimators may cover different layers; an outer join would sort them out of depth order.
    both = {axis: list(table.checkpoints if "checkpoint" in axis else table.layers()) for axis in AXES}
    targets = (block.layers_b or () for block in table.blocks if block.columns == "targets")
    both["target"] = list(dict.fromkeys(name for names in targets for name in names))
    used = {axis: both[axis] for axis in both if any(axis in array.dims for array in arrays.values())}
    fitted = {name: array.reindex({axis: used[axis] for axis in array.dims}) for name, array in arrays.items()}
    return xarray.Dataset(fitted, coords=used)
