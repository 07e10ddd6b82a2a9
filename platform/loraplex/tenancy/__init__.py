"""Tenants, keys, limits, usage; the quota gate of gateways and the share book of the controller. Knows no adapters.

What is exported here needs no database; ``accounts`` and ``tables`` are the controller's.
"""

from loraplex.tenancy.config import TenancyConfig
from loraplex.tenancy.quota_gate import QuotaGate, Reservation
from loraplex.tenancy.share_book import ShareBook

__all__ = ["QuotaGate", "Reservation", "ShareBook", "TenancyConfig"]
