"""The guard: audits what attention leaves out, moves thresholds, repairs and logs. See docs/guard.md."""

from pyllm.guard.settings import Guard

__all__ = ["Guard"]
