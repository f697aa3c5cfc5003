"""The folder on disk: a plan and rows come in; shards, records and a manifest that survive a crash go out."""
