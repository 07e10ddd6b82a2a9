"""Composes the parts' own config structs from one YAML file."""
