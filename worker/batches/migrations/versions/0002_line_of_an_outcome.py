"""The line of a result: a record's number is not its line where the file has blank ones."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; results that are there have none, and their record's number stands for it."""
    op.add_column("outcomes", sa.Column("line", sa.Integer(), nullable=True))
