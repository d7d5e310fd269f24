"""What Flower starts on the server."""

from cdfkd_strategy.flower.apps import make_server_app

app = make_server_app()
