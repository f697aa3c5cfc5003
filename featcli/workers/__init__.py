"""Who makes the shards: a work order comes in; committed shards and statistics go out, whoever died on the way."""
