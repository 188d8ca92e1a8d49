"""Pictures of what quantization does, as arrays: what each tensor costs, outliers, forgetting, bounds, positions.

Every function returns data; quamba.analysis.figures draws it, and quamba.analysis.report writes it all down.
"""

from quamba.analysis.decay import Decay, decay
from quamba.analysis.hippo import Bound, error_bound
from quamba.analysis.length import PositionErrors, position_errors
from quamba.analysis.outliers import Outliers, outliers
from quamba.analysis.run import Analysis, Settings, analyze
from quamba.analysis.sensitivity import BlockErrors, Cost, block_errors, tensor_costs
from quamba.analysis.study import OpenModel, Study, opened, study

__all__ = [
    "Analysis",
    "BlockErrors",
    "Bound",
    "Cost",
    "Decay",
    "OpenModel",
    "Outliers",
    "PositionErrors",
    "Settings",
    "Study",
    "analyze",
    "block_errors",
    "decay",
    "error_bound",
    "opened",
    "outliers",
    "position_errors",
    "study",
    "tensor_costs",
]
