"""Images on disk to a client's share: data sets, partitions, local splits; and the pool of synthetic images."""
