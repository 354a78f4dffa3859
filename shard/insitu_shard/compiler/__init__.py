"""The session compiler: turns traces into forward passes. Values in, plans out: no torch, no model.

`outline.py` knows where in a forward pass a module is, `facts.py` what a trace needs of a pass,
`lanes.py` which rows traces share, `passes.py` which traces share a pass, and `window.py` which
traces may run at all. `explanation.py` tells people of it, and `apart.py` why traces do not share a
pass.
"""

from insitu_shard.compiler.apart import reason_for_apart
from insitu_shard.compiler.explanation import ExplainedPass, Explanation
from insitu_shard.compiler.facts import GENERATES, GRADIENTS, Fork, TraceFacts
from insitu_shard.compiler.lanes import Lane, LaneTree
from insitu_shard.compiler.outline import Outline
from insitu_shard.compiler.passes import Limits, Pass, plan_passes
from insitu_shard.compiler.window import Window, WindowStep

__all__ = [
    "GENERATES",
    "GRADIENTS",
    "ExplainedPass",
    "Explanation",
    "Fork",
    "Lane",
    "LaneTree",
    "Limits",
    "Outline",
    "Pass",
    "TraceFacts",
    "Window",
    "WindowStep",
    "plan_passes",
    "reason_for_apart",
]
