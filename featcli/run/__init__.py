"""What a worker runs: shards to make come in; decoded, computed and committed shards go out."""
