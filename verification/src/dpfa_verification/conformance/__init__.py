"""The conformance suite: ``check_mechanism``, ``check_accountant``, ``check_backend``, and ``verify`` for all.

Plugins are found through their entry points, first-party ones like all others.
"""

from dpfa_verification.conformance.checks import check_accountant, check_backend, check_mechanism
from dpfa_verification.conformance.rendering import render
from dpfa_verification.conformance.report import Report
from dpfa_verification.conformance.suite import verify

__all__ = ["Report", "check_accountant", "check_backend", "check_mechanism", "render", "verify"]
