"""Chooses a replica for each client request and carries its tokens back, across the death of a replica."""
