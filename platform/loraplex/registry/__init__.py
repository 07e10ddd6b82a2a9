"""Adapters of all tenants: strict intake, identity, versions and aliases, artifact store, node disk cache."""
