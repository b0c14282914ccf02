"""Which events an evaluation may see."""

from __future__ import annotations

import polars as pl
import pytest
from artifacts_by_hand import Write
from sealing import reseal

from recast_cli.errors import ArtifactError
from recast_cli.evaluation.split import load_log, load_split

CODES = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
SEQUENCES = {"a": [3, 1, 4, 0], "b": [5, 2, 2, 1]}


def test_histories_hold_every_earlier_event(write: Write) -> None:
    data = write(SEQUENCES, CODES, (2, 3), history=1).data
    test, validation = load_split(data, "test"), load_split(data, "validation")
    assert [history.tolist() for history in test.histories] == [[3, 1, 4], [5, 2, 2]]
    assert [history.tolist() for history in validation.histories] == [[3, 1], [5, 2]]
    assert test.target_U.tolist() == [0, 1]
    assert validation.target_U.tolist() == [4, 2]


def test_baselines_learn_only_from_the_past_of_every_target(write: Write) -> None:
    data = write(SEQUENCES, CODES, (2, 3)).data
    assert load_split(data, "test").train_item_E.tolist() == [3, 1, 4, 5, 2, 2]
    assert load_split(data, "test").train_user_E.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_split(data, "validation").train_item_E.tolist() == [3, 1, 5, 2]


def test_log_is_ordered_by_position_whatever_the_file_order(write: Write) -> None:
    data = write(SEQUENCES, CODES, (2, 3)).data
    path = data / "interactions.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    reseal(data)
    log = load_log(data)
    assert log.before("a").tolist() == [3, 1, 4, 0]
    assert log.before("b", 2).tolist() == [5, 2]


def test_rows_that_do_not_fit_are_refused(write: Write) -> None:
    data = write(SEQUENCES, CODES, (2, 3)).data
    test, log = pl.read_parquet(data / "test.parquet"), pl.read_parquet(data / "interactions.parquet")
    test.with_columns(position=pl.col("position") - 1).write_parquet(data / "test.parquet")
    reseal(data)
    with pytest.raises(ArtifactError, match="has target i0, not so in the interactions"):
        load_split(data, "test")
    test.with_columns(index=pl.lit(7, pl.Int64)).write_parquet(data / "test.parquet")
    reseal(data)
    with pytest.raises(ArtifactError, match="share an index"):
        load_split(data, "test")
    test.clear().write_parquet(data / "test.parquet")
    reseal(data)
    with pytest.raises(ArtifactError, match="has no rows"):
        load_split(data, "test")
    log[1:].write_parquet(data / "interactions.parquet")
    reseal(data)
    with pytest.raises(ArtifactError, match="do not count 0, 1, 2"):
        load_split(data, "validation")
    log.with_columns(item_id=pl.lit("i77")).write_parquet(data / "interactions.parquet")
    reseal(data)
    with pytest.raises(ArtifactError, match="8 interactions name no item"):
        load_split(data, "validation")


def test_a_test_target_stays_unseen_where_a_user_has_no_validation_row(write: Write) -> None:
    data = write(SEQUENCES, CODES, (2, 3)).data
    validation = pl.read_parquet(data / "validation.parquet")
    validation.filter(pl.col("user_id") == "a").write_parquet(data / "validation.parquet")
    reseal(data)
    assert load_split(data, "validation").train_item_E.tolist() == [3, 1, 5, 2, 2]
