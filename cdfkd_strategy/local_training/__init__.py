"""How clients train their teachers: one round of one client (`client_round`), and all clients of round 1 (`all_clients`)."""

from cdfkd_strategy.local_training.all_clients import Trained, initial_model, train_all
from cdfkd_strategy.local_training.client_round import ClientsConfig, train_teacher

__all__ = ["ClientsConfig", "Trained", "initial_model", "train_all", "train_teacher"]
