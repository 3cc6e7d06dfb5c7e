"""What an error says, and that it survives the trip between processes."""

from __future__ import annotations

import pickle

import pytest

from harken.errors import ClipError, ConfigError, DataError, HarkenError, TransientError, nearest, status_of, unknown


@pytest.mark.parametrize("error", [ConfigError, DataError, TransientError, ClipError])
def test_every_error_on_purpose_is_a_harken_error(error: type[Exception]) -> None:
    assert issubclass(error, HarkenError)


@pytest.mark.parametrize(
    ("error", "says"),
    [(ClipError("qc.silent", "-80 dBFS"), "qc.silent: -80 dBFS"), (ClipError("qc.silent"), "qc.silent")],
)
def test_a_clip_error_says_its_reason_and_survives_pickling(error: ClipError, says: str) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.reason, back.message) == (says, error.reason, error.message)
    assert str(error) == says


def test_an_unknown_name_is_met_with_the_nearest_and_all_known_ones() -> None:
    error = unknown("params.yaml: train.loss", "pmrr", ["triplet_max", "pmr", "nt_xent"])
    assert isinstance(error, ConfigError)
    assert str(error) == (
        "params.yaml: train.loss: unknown name 'pmrr'. Did you mean 'pmr'? Known: nt_xent, pmr, triplet_max."
    )


def test_the_exit_status_says_whether_trying_again_may_help() -> None:
    assert status_of(TransientError("away")) == 75
    assert {status_of(e) for e in (HarkenError(), ConfigError(), DataError(), OSError())} == {1}


def test_a_name_like_no_other_gets_no_guess() -> None:
    assert nearest("zzz", ["pmr", "nt_xent"]) is None
    assert "Did you mean" not in str(unknown("stage", None, ["pmr"]))
