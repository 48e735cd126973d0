"""From files to weights: reading safetensors, matching their names to a model, filling it in."""

from fp8jax.checkpoints.errors import CheckpointError
from fp8jax.checkpoints.folder import Checkpoint
from fp8jax.checkpoints.load_report import LayerReport, LoadReport

__all__ = ["Checkpoint", "CheckpointError", "LayerReport", "LoadReport"]
