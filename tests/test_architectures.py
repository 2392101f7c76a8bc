"""`split` of every architecture of transformers: right logits, or a reason why not, as `architectures.txt` says."""

from __future__ import annotations

import warnings
from pathlib import Path

import architectures
import pytest
import transformers

RECORD = (Path(__file__).parent / "architectures.txt").read_text().splitlines()
VERSION = RECORD[0].split()[-1]
OUTCOMES = dict(line.split(": ", 1) for line in RECORD[1:])
IS_RECORDED = transformers.__version__ == VERSION
INSTALLED = architectures.architectures()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", sorted(INSTALLED.keys() | OUTCOMES.keys()))
def test_logits_are_the_models_own_or_the_model_is_refused(model_class: str) -> None:
    """In another version of transformers than the recorded one, only wrong logits are a failure: the rest is said."""
    recorded = OUTCOMES.get(model_class, "not recorded")
    if model_class in INSTALLED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, on configurations as small as these
            outcome = architectures.outcome(model_class, INSTALLED[model_class])
    else:
        outcome = "not in this version"
    assert not outcome.startswith("wrong")
    if not IS_RECORDED and outcome != recorded:
        pytest.skip(f"transformers {transformers.__version__}: {outcome}; in {VERSION}: {recorded}")
    assert outcome == recorded
