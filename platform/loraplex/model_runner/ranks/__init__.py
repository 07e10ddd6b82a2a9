"""A group of ranks behind one executor: processes that each hold a shard, and the messages that drive them."""
