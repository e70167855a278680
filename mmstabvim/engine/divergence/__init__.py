"""Find, record and report non-finite values of any model of mmengine.

:func:`trace_loss` takes any PyTorch model. Nothing here knows Mamba:
:class:`mmstabvim.DivergenceHook` puts the parts into a training.
"""

from mmstabvim.engine.divergence.record import replay, save_record
from mmstabvim.engine.divergence.report import Divergence, write_report
from mmstabvim.engine.divergence.step_watch import StepWatch
from mmstabvim.engine.divergence.tensor_range import (
    TensorRange,
    largest_entry,
    nonfinite_names,
)
from mmstabvim.engine.divergence.trace import (
    StepTrace,
    trace_loss,
    trace_step,
)

__all__ = [
    'Divergence',
    'StepTrace',
    'StepWatch',
    'TensorRange',
    'largest_entry',
    'nonfinite_names',
    'replay',
    'save_record',
    'trace_loss',
    'trace_step',
    'write_report',
]
