"""One rule per layer type: how its forward is computed so that backward notes per-sample terms.

Autograd never forms a weight gradient: the parameters enter detached, and each rule's backward writes
down what the backend's ``sqnorm`` and ``clipped_grad`` need.
"""

from dpfa_training.per_sample.rule import RULES, Rule, rule_for

__all__ = ["RULES", "Rule", "rule_for"]
