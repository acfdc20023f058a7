"""Shared types and utilities: groups, score matrices, options, ranks, files and errors. All other subpackages depend on this one."""
