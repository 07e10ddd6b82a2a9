"""The steps from one schema of the control database to the next. Taken by ``schema``; a file in ``versions`` is one."""
