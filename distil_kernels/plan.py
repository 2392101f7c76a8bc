"""How a call is computed: the plan, its chunk sizes, and the memory that it takes.

`Plan` goes into any op as `plan=`; `choose_plan` is the choice of `plan="auto"` as a pure function of a call's `Shape`.
"""

from distil_kernels.engine.plan import PLANS, Plan, choose_plan, extra_bytes
from distil_kernels.engine.sizes import Shape

__all__ = ["PLANS", "Plan", "Shape", "choose_plan", "extra_bytes"]
