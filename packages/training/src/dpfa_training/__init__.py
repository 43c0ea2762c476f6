"""DP-SGD for transformers: exact attention, one backward, clipping by groups, noise once per step, a ledger."""

from dpfa_training.adaptive_clipping import QuantileClipping
from dpfa_training.checkpoint import load_checkpoint, save_checkpoint
from dpfa_training.clipped_gradients import clipped_gradients
from dpfa_training.dp_adam import DPAdamBC
from dpfa_training.engine import NOT_COVERED, Engine
from dpfa_training.plan import TrainingPlan
from dpfa_training.private import engine_of, make_private, make_private_with_epsilon, plan_for_target

__version__ = "0.1.0"

__all__ = [
    "NOT_COVERED",
    "DPAdamBC",
    "Engine",
    "QuantileClipping",
    "TrainingPlan",
    "clipped_gradients",
    "engine_of",
    "load_checkpoint",
    "make_private",
    "make_private_with_epsilon",
    "plan_for_target",
    "save_checkpoint",
]
