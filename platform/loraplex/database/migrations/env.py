"""Alembic runs this file for each command. The steps go through the connection that ``schema`` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
