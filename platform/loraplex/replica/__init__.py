"""One engine on one group: the loop that runs it, the staging of its adapters, and the server that gateways reach."""
