"""The one private thing these tests need from Flower, which refuses to build a Message outside its own processes."""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
