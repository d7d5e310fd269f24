"""What Flower starts on every client."""

from cdfkd_strategy.flower.apps import make_client_app

app = make_client_app()
