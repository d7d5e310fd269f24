"""A client's place in a run: which configuration, which client it is, and whose images it trains on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache

from flwr.app import Context, Message

from cdfkd_strategy.data.client_share import ClientShare, client_share, own_share
from cdfkd_strategy.data.datasets import DataConfig, ImageData, load_data
from cdfkd_strategy.data.partition import OWN
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.flower import payload
from cdfkd_strategy.run_config import RunConfig, from_values

DATA_PATH, DATA_NAME = "data-path", "data-name"
"""Keys of a node's configuration: where its own images are, and what they are (a data set's name; a file is ``npz``, a folder ``folder``)."""


@dataclass(frozen=True)
class Place:
    """A client's place in a run. Images are read when they are first asked for.

    Args:
        config: of the run.
        partition_id: which client this is.
        own: the client's own data set; None takes a share of the run's.
    """

    config: RunConfig
    partition_id: int
    own: DataConfig | None = None

    @property
    def arch(self) -> str:
        """The architecture of this client's teacher."""
        return self.config.clients.architecture(self.partition_id)

    @property
    def data(self) -> ImageData:
        """The data set behind this client's share."""
        return _load(self.own or self.config.data, self.config.seed)

    def share(self) -> ClientShare:
        """This client's images: all of its own, or its share of the run's."""
        config = self.config
        if self.own is not None:
            return own_share(self.data, self.own, self.partition_id, config.seed)
        return client_share(self.data, config.data, config.clients.count, self.partition_id, config.seed)


def place_of(message: Message, context: Context, config: RunConfig | None, own: DataConfig | None = None) -> Place:
    """Find out which run, client and images a message is about.

    Args:
        message: brings the run's configuration as JSON, if ``config`` is None.
        context: its ``node_config`` holds ``partition-id``, and ``data-path`` or ``data-name`` where the node has images of its own.
        config: of the run, if the client knows it.
        own: the client's own data set, if its node's configuration names none.

    Raises:
        ConfigError: there is no configuration, or no partition id; or the client has images of its own where the run deals its own, or none where
            it should.
    """
    if config is None:
        text = payload.run_config_json(payload.config_of(message.content))
        if text is None:
            raise ConfigError("the message brings no run configuration; give make_client_app(config) one, or use make_server_app on the server")
        config = _parse(text)
    partition_id = context.node_config.get("partition-id")
    if not isinstance(partition_id, int) or isinstance(partition_id, bool):
        raise ConfigError(
            f"the node's configuration has partition-id={partition_id!r}; accepted: an integer from 0; "
            'start the SuperNode with --node-config "partition-id=0 num-partitions=4"'
        )
    return Place(config, partition_id, _own(named_data(context) or own, config.data))


def named_data(context: Context) -> DataConfig | None:
    """The data set that a node's configuration names, or None.

    Raises:
        ConfigError: path or name is not a text.
    """
    path, name = (context.node_config.get(key) for key in (DATA_PATH, DATA_NAME))
    if path is None and name is None:
        return None
    if not isinstance(path, str | None) or not isinstance(name, str | None):
        raise ConfigError(f"the node's configuration has {DATA_PATH}={path!r} and {DATA_NAME}={name!r}; accepted: texts in quotes, '{DATA_PATH}=\"/my.npz\"'")
    return DataConfig(name=name or ("npz" if str(path).endswith(".npz") else "folder"), path=path)


def _own(own: DataConfig | None, run: DataConfig) -> DataConfig | None:
    """A client's own data set in the terms of the run: its image size, normalisation and class numbers."""
    dealt = run.name is not None and run.partition.name != OWN
    if own is None:
        if dealt:
            return None
        raise ConfigError(
            "the clients of this run have images of their own, and this node names none; start the SuperNode with --node-config "
            f"'partition-id=0 {DATA_PATH}=\"/data/mine.npz\"' (a .npz file, or an image folder)"
        )
    if dealt:
        raise ConfigError(
            f"this node has images of its own ({own.path or own.name}), but the run deals those of {run.name!r} to its clients; "
            f"set data.partition.name={OWN} (or data.name=null) at the server, or start the SuperNode without {DATA_PATH}"
        )
    if run.image is None:
        raise ConfigError("the run does not say what its images are like; give data.image in the configuration of make_client_app, as at the server")
    names = own.class_names or run.class_names
    if own.name == "folder" and names is None:
        raise ConfigError(f"the image folder {own.path} needs data.class_names at the server, or its classes would have other numbers than at other clients")
    square = run.image.height if run.image.height == run.image.width else None
    return dataclasses.replace(own, image=run.image, class_names=names, image_size=own.image_size or run.image_size or square, local_test=run.local_test)


@lru_cache(maxsize=1)
def _parse(text: str) -> RunConfig:
    return from_values(json.loads(text))


@lru_cache(maxsize=1)
def _load(config: DataConfig, seed: int) -> ImageData:
    """The data set of the last message: in a simulation the next message is about the same one."""
    return load_data(config, seed)
