"""Alembic's hook: runs the migrations on the connection that `worker.batches.migrate` opened, in its transaction."""

from alembic import context

from worker.batches.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
