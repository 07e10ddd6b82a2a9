"""HTTP and gRPC front of the cluster: keys, models, text, quota, streams. Knows tokens only as numbers to count."""
