"""Search for whole networks: one supernet, one evolutionary loop, and a file for each paper."""
