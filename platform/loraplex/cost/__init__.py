"""What a step costs on a GPU: its bytes and FLOPs against measured ceilings. Pure; imports core and numpy only.

Called by ``bench`` (how far a step is from the ideal) and as the analytic profile of simulator and planner.
"""
