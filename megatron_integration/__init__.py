"""Cut cross-entropy in Megatron-core's output layer, behind one flag.

from megatron_integration import CceConfig, install
install(model, CceConfig())
"""

from megatron_integration.config import CceConfig, add_cce_arguments, cce_requested, take_alias
from megatron_integration.install import (
    cce_model_provider,
    far_field_metrics,
    fused_count,
    install,
    materialized_count,
    pre_wrap_hook,
    uninstall,
)

__all__ = [
    "CceConfig",
    "add_cce_arguments",
    "cce_model_provider",
    "cce_requested",
    "far_field_metrics",
    "fused_count",
    "install",
    "materialized_count",
    "pre_wrap_hook",
    "take_alias",
    "uninstall",
]
