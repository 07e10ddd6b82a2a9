"""From a plan to running replicas and back to a better plan: desired and observed state, the steps between them.

``diff`` decides and is pure; ``manager`` carries out over an ``Actuator`` and keeps what it began in ``store``.
"""
