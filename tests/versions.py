"""What some supported releases of torch lack, as marks for the tests that use it."""

import inspect

import pytest
import torch
from torch import nn

BATCH_NORM_TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters

needs_batch_norm_without_bias = pytest.mark.skipif(
    not BATCH_NORM_TAKES_BIAS, reason=f"nn.BatchNorm2d of torch {torch.__version__} has no argument `bias`"
)
needs_state_dict_post_hooks = pytest.mark.skipif(
    not hasattr(nn.Module, "register_state_dict_post_hook"),
    reason=f"nn.Module of torch {torch.__version__} has no register_state_dict_post_hook",
)
needs_onnx_dynamic_shapes = pytest.mark.skipif(
    "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters,
    reason=f"torch.onnx.export of torch {torch.__version__} takes no `dynamic_shapes`",
)
needs_compiled_function_modes = pytest.mark.skipif(
    torch.__version__ < (2, 5), reason="the compiler of torch 2.4 does not trace a TorchFunctionMode"
)
needs_checkpoints_of_compiled_modules = pytest.mark.skipif(
    torch.__version__ < (2, 5), reason="torch 2.4 cannot checkpoint what is compiled, nn.BatchNorm2d included"
)
needs_graph_breaks_with_named_tuples = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="after a graph break, Dynamo of torch 2.11 cannot take up named tuples"
)
needs_layouts_of_gradients = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="the compiler of older releases makes gradients contiguous before a backward"
)
needs_sign_of_exports = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason=f"torch {torch.__version__} does not tell that it exports"
)
