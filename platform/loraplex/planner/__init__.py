"""From traffic and a fleet to a plan: layouts, groups, adapter sets. Pure: values in, values out.

Owns the search, the baselines that it is compared with, and the price of a move from one plan to another; knows no
files, no clock but the one handed in, nothing of Ray. Called by the commands ``plan``, ``whatif`` and the controller.
"""
