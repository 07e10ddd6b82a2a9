"""Fakes of the seams between parts, shipped for our own tests and those of users."""
