"""Who makes the shards: a work order comes in; committed shards and statistics come out, whoever died on the way."""
