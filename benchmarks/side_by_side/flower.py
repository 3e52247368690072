"""Flower: its server averages (python flower.py PORT ROUNDS PEERS), and clients do the local steps when it asks them to."""

import os
import sys
import time
from collections.abc import Callable


def serve(port: int, rounds: int, peers: int) -> None:
    from flwr.compat.server.app import start_server
    from flwr.server.server_config import ServerConfig
    from flwr.server.strategy import FedAvg
    strategy = FedAvg(fraction_evaluate=0.0, min_fit_clients=peers, min_available_clients=peers)
    start_server(server_address=f"127.0.0.1:{port}", config=ServerConfig(num_rounds=rounds), strategy=strategy)


def train(job, rounds: int, mark: Callable[[], None]) -> None:
    """A client's part: `mark` is called whenever an average has arrived."""
    import torch
    from flwr.client import NumPyClient
    from flwr.compat.client.app import start_client
    from systems import local

    class Client(NumPyClient):
        done = 0

        def get_parameters(self, config):
            return [job.vector.numpy()]

        def fit(self, parameters, config):
            job.vector.copy_(torch.from_numpy(parameters[0]))
            if self.done:
                mark()
            self.done += 1
            if self.done <= rounds:
                local(job)
            return [job.vector.numpy()], 1, {}

    for _ in range(60):  # the server may not be up yet
        try:
            return start_client(server_address=f"127.0.0.1:{os.environ['FLOWER_PORT']}", client=Client().to_client(), max_retries=5)
        except Exception as error:
            failed = error
            time.sleep(1)
    raise failed


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
