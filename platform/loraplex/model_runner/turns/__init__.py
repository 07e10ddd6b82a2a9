"""Replicas that share a group's GPUs take turns by step: a queue of processes, and an executor that stands in it."""
