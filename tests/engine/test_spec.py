"""A Spec comes back from its text as it was, to the last bit."""

from __future__ import annotations

import math

import pytest

from distil_kernels.backends import Cost, LogitScaling, Statistic
from distil_kernels.engine.credit import Credit
from distil_kernels.engine.gradients import Needs
from distil_kernels.engine.policy import Policy
from distil_kernels.engine.spec import Spec

SPECS = {
    "plain": Spec("cpu", "first choice", "recompute", "asked for by name"),
    "everything": Spec(
        "triton", 'cannot "import"\n\tC:\\path', "gradient_in_forward", "ß → ε", needs=Needs(True, False, True),
        cost=Cost(Statistic.JSD, 0.1), student=LogitScaling(0.1 + 0.2, 5e-324), teacher=LogitScaling(1 / 3, None, 0.1),
        gradient_threshold=math.nextafter(1.0, 0.0),
        credit=Credit("sequence", "values", 4, 0.9, 10**12, True, 1e300, -0.0, math.pi),
        policy=Policy(None, 0.28, -1e-17, 0.3),
    ),
    "infinite": Spec("cpu", "", "recompute", "", student=LogitScaling(math.inf), gradient_threshold=-math.inf),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_text_and_back(name):
    spec = SPECS[name]
    decoded = Spec.decode(spec.encode())
    assert decoded == spec
    assert repr(decoded) == repr(spec)  # -0.0 is not 0.0, True not 1, a Statistic not its number
    assert hash(decoded) == hash(spec)
    assert decoded.encode() == spec.encode()


@pytest.mark.parametrize("name", SPECS)
def test_floats_apart(name):
    """One text for every value of the floats, which come back from a tensor to the last bit."""
    text, numbers = SPECS[name].encode_apart()
    assert repr(Spec.decode(text, numbers)) == repr(SPECS[name])
    student = SPECS[name].student._replace(temperature=0.25)
    assert text == SPECS[name]._replace(student=student).encode_apart()[0]
    assert math.isnan(Spec.decode(text).student.temperature) and Spec.decode(text).plan == SPECS[name].plan


def test_fields_are_printed_by_name():
    text = SPECS["everything"].encode()
    assert '"plan": "gradient_in_forward"' in text
    assert '"policy": {"clip_low": null, "clip_high": 0.28, "entropy_weight": -1e-17, "reference_weight": 0.3}' in text
