"""Errors of every package: what was expected, what came, what to do."""

from __future__ import annotations


class DPFAError(Exception):
    """Base of all errors raised on purpose by DP-Flash-Attention."""


class PrivacyParameterError(DPFAError, ValueError):
    """A parameter, file or combination of options that cannot be used; the text names the remedy."""


class PluginError(DPFAError):
    """A plugin that cannot be loaded or does not keep its contract."""


class BackendUnavailable(DPFAError):
    """No backend, or not the one asked for, can run the problem; the text lists the reasons."""


class UnsupportedEvent(DPFAError):
    """An accountant was given an event, or a question about it, for which it has no valid bound."""


class BudgetExhausted(DPFAError):
    """The next release would exceed the budget; nothing was released and nothing was recorded."""


class LedgerError(DPFAError):
    """The ledger cannot be opened, does not fit its use, or was altered."""


class NotPrivateError(DPFAError):
    """A path, parameter, sampler or gradient that the guarantee does not cover."""
