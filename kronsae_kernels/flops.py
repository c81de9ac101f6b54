"""Import this for `torch.utils.flop_counter.FlopCounterMode` to count the operators' products.

Apart, as torch's module imports Triton.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from kronsae_kernels.rules import OPERATORS

for _name, _rules in OPERATORS.items():
    register_flop_formula(getattr(torch.ops.kronsae, _name), get_raw=True)(
        lambda *args, out_val=None, rules=_rules: rules.flops(*args)
    )
