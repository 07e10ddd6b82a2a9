"""The response header that names the gateway which answered. Apart from ``gateway_app``, whose import needs Serve."""

GATEWAY_HEADER = "x-loraplex-gateway"
