"""The public gRPC contract ``loraplex.v1`` and the code generated from it."""
