"""Backbones: a checkpoint and its options come in; one kind of `Backbone`, loaded, cut and frozen, goes out."""
