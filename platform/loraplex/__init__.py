"""Loraplex: multi-tenant LoRA serving. Everything that decides and computes; no Ray in here."""
