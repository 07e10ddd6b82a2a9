"""The control database: engine, sessions, schema version and the controller's lease. Opened by the controller only."""
