"""Fakes of the seams between parts, and tiny real ones, shipped for our own tests and those of users."""
