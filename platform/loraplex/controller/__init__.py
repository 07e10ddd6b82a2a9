"""The controller: the only writer of cluster state. Implements ``core.control.ControlPlane`` in-process."""
