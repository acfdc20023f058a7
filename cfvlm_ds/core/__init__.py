"""Shared types: groups, score matrices, options, ranks, files, errors. Every other folder imports them."""
